//! Images per second through whole backbones on `flex`, forward and forward + backward.
//!
//! `cargo bench -p dinoxide-benches --bench backbones` prints the median of several runs of 32 images of 64 px.

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use dinoxide_model::{Arch, Backbone, CropGroup, ModelConfig};
use dinoxide_random::{Purpose, stream};

const RUNS: usize = 7;
const IMAGES: usize = 32;
const SIZE: usize = 64;

fn main() {
    println!("{} threads, {IMAGES} images of {SIZE} px", std::thread::available_parallelism().map_or(1, usize::from));
    println!("{:16} {:>18} {:>28}", "", "forward, images/s", "forward + backward, images/s");
    for (name, arch, patch_size) in [("ViT-S/8", Arch::VitSmall, 8), ("ConvNeXt-T", Arch::ConvNextTiny, 16)] {
        let config = ModelConfig { arch, patch_size, ..ModelConfig::default() };
        let architecture = config.resolve(SIZE).expect("sizes fit");
        let plain = Device::flex();
        let images = Tensor::<4>::random([IMAGES, 3, SIZE, SIZE], Distribution::Normal(0.0, 1.0), &plain);
        let mut rng = stream(0, Purpose::Init, 0, 0);
        let teacher = Backbone::new(&architecture, &plain, &mut rng);
        let forward = median(|| drop(teacher.forward(images.clone(), None).cls.into_data()));
        let student = Backbone::new(&architecture, &plain.autodiff(), &mut rng);
        let draws = architecture.draw(IMAGES, &mut rng);
        let images = Tensor::from_inner(images);
        let step = median(|| {
            let features = student.forward_train(images.clone(), None, CropGroup::Global, &draws);
            drop((features.cls.powi_scalar(2).sum() + features.patches.powi_scalar(2).sum()).backward());
        });
        let rate = |seconds: f64| IMAGES as f64 / seconds;
        println!("{name:16} {:18.1} {:28.1}", rate(forward), rate(step));
    }
}

/// The median time in seconds, after a first run.
fn median(mut f: impl FnMut()) -> f64 {
    f();
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[RUNS / 2]
}
