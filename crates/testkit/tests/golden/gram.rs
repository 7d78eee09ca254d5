//! Gram cases of fixture `losses`: all variants of the loss, and the resizing of the teacher's tokens before it.

use burn::tensor::Tensor;
use dinoxide_losses::gram::{Negatives, gram};
use dinoxide_model::interpolation::{Filter, resize_tokens};
use dinoxide_testkit::Check;
use serde_json::Value;

use crate::{
    losses::{compare, plain, selected, student},
    tensors::array,
};

/// `gram.*`: which tokens, in one matrix per image or in one for the batch, what of the negatives.
pub(crate) fn tokens(check: &mut Check, case: &str, hyper: &Value) {
    let x: Tensor<3> = student(check, "gram.in.student");
    let y: Tensor<3> = plain(check, "gram.in.teacher");
    let negatives = match hyper["neg"].as_str() {
        Some("none") => Negatives::Keep,
        Some("remove_neg") => Negatives::Remove,
        // The reference looks for the teacher's negatives after having removed them.
        Some("remove_only_teacher_neg") => Negatives::RemoveTeacher,
        _ => panic!("`neg` is {}", hyper["neg"]),
    };
    let flag = |key: &str| hyper[key].as_bool().unwrap_or_else(|| panic!("`{key}` is {}", hyper[key]));
    let masks = check.fixture.array::<bool>("gram.in.masks").values;
    let rows: Vec<i32> = match hyper["tokens"].as_str() {
        Some("all") => (0..masks.len() as i32).collect(),
        Some("masked") => (0..masks.len() as i32).filter(|&i| masks[i as usize]).collect(),
        Some("unmasked") => (0..masks.len() as i32).filter(|&i| !masks[i as usize]).collect(),
        _ => panic!("`tokens` is {}", hyper["tokens"]),
    };
    let in_one = |x: Tensor<3>| {
        let [images, patches, dim] = x.dims();
        selected(x.reshape([images * patches, dim]), &rows).unsqueeze::<3>()
    };
    let (x_used, y) = if flag("img_level") { (x.clone(), y) } else { (in_one(x.clone()), in_one(y)) };
    let loss = gram(x_used, y, flag("apply_norm"), negatives);
    compare(check, &loss, 1.0, &format!("{case}.out.loss"), &x, &format!("{case}.out.grad.student"));
}

/// `gram_resize.*`: the teacher's tokens are on another square grid than the student's.
pub(crate) fn resized(check: &mut Check, case: &str, hyper: &Value) {
    let x: Tensor<3> = student(check, "gram_resize.in.student");
    let y: Tensor<3> =
        plain(check, &format!("gram_resize.in.teacher_{}", hyper["teacher_tokens"].as_str().expect("a name")));
    let filter = match hyper["method"].as_str() {
        Some("bicubic") => Filter::Bicubic,
        Some("bilinear") => Filter::Bilinear,
        _ => panic!("`method` is {}", hyper["method"]),
    };
    let antialias = hyper["antialias"].as_bool().expect("`antialias`");
    let (from, to) = (y.dims()[1].isqrt(), hyper["student_grid"].as_u64().expect("`student_grid`") as usize);
    let y = resize_tokens(y, (from, from), (to, to), filter, antialias);
    check.tensor(&format!("{case}.out.resized"), &array(y.clone()));
    let loss = gram(x.clone(), y, true, Negatives::Keep);
    compare(check, &loss, 1.0, &format!("{case}.out.loss"), &x, &format!("{case}.out.grad.student"));
}
