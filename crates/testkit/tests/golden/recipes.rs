//! What the fixtures `train_*` say about a run: backbone, heads, losses, optimizer, and the values of each step.

use dinoxide_losses::gram::Negatives;
use dinoxide_model::{VitConfig, interpolation::Filter};
use dinoxide_testkit::Fixture;
use dinoxide_trainer::{
    loss::{CenterOver, Centering, EMA, GramConfig, GramTokens, LossConfig},
    optimizer::{Clip, Freeze, OptimConfig},
    schedule::{GramRefresh, Scheduled},
};
use serde_json::{Value, json};

use crate::vit;

/// A run's fixed settings.
pub(crate) struct Recipe {
    pub(crate) backbone: VitConfig,
    pub(crate) loss: LossConfig,
    pub(crate) optim: OptimConfig,
}

/// The first of these keys that the object has.
fn first<'a>(object: &'a Value, keys: &[&str]) -> &'a Value {
    keys.iter().map(|key| &object[*key]).find(|value| !value.is_null()).unwrap_or(&Value::Null)
}

fn number(object: &Value, key: &str) -> f64 {
    object[key].as_f64().unwrap_or_else(|| panic!("`{key}` is {}, not a number", object[key]))
}

impl Recipe {
    /// DINOv3: `hyper.cfg` is the reference's configuration, in which `hyper.arch` replaces the size of the model.
    pub(crate) fn v3(fixture: &Fixture) -> Self {
        let cfg = &fixture.hyper()["cfg"];
        let mut model = model(fixture.hyper());
        model["layerscale_init"] = cfg["student"]["layerscale"].clone();
        let (loss, optim) = configured(cfg);
        Self { backbone: masked(fixture, vit::v3_config(&model)), loss, optim }
    }

    /// The backbone of DINOv3's frozen teacher; `None` without distillation.
    ///
    /// Its configuration is laid over the reference's defaults. Sizes that it does not state are those of the weights.
    pub(crate) fn v3_teacher(fixture: &Fixture) -> Option<VitConfig> {
        let distillation = &fixture.hyper()["cfg"]["distillation"];
        if distillation["enabled"].as_bool() != Some(true) {
            return None;
        }
        const WEIGHTS: &str = "w.teacher.backbone.";
        let shape = |name: &str| fixture.shape(&format!("{WEIGHTS}{name}"));
        let dim = shape("cls_token")[2];
        let depth = (0..).take_while(|i| fixture.has(&format!("{WEIGHTS}blocks.{i}.norm1.weight"))).count();
        let mut model = distillation["teacher_cfg"]["student"].clone();
        // Rotary positions have a period for each four columns of a head.
        model["num_heads"] = json!(dim / (4 * shape("rope_embed.periods")[0]));
        model["embed_dim"] = json!(dim);
        model["depth"] = json!(depth);
        model["layerscale_init"] = model["layerscale"].as_f64().unwrap_or(1e-5).into();
        let mut config = vit::v3_config(&model);
        let first = if fixture.has(&format!("{WEIGHTS}blocks.0.mlp.w1.weight")) { "w1" } else { "fc1" };
        config.ffn_hidden = shape(&format!("blocks.0.mlp.{first}.weight"))[0];
        Some(masked_by(fixture, WEIGHTS, config))
    }

    /// DINOv2, likewise.
    pub(crate) fn v2(fixture: &Fixture) -> Self {
        let cfg = &fixture.hyper()["cfg"];
        let mut model = model(fixture.hyper());
        model["init_values"] = cfg["student"]["layerscale"].clone();
        model["img_size"] = img_size(fixture, &model);
        let (loss, optim) = configured(cfg);
        Self { backbone: masked(fixture, vit::v2_config(&model)), loss, optim }
    }

    /// DINO and iBOT: arguments of a command line.
    pub(crate) fn arguments(fixture: &Fixture) -> Self {
        let hyper = fixture.hyper();
        let mut model = json!({
            "embed_dim": hyper["D"], "depth": hyper["depth"], "num_heads": hyper["heads"],
            "mlp_ratio": hyper["mlp_ratio"], "patch_size": hyper["patch_size"], "init_values": hyper["init_values"],
            "norm_eps": hyper["norm_eps"],
        });
        model["img_size"] = img_size(fixture, &model);
        let patches = fixture.names("batch0.masks").next().is_some();
        Self {
            backbone: masked(fixture, vit::v2_config(&model)),
            loss: LossConfig {
                dino_weight: hyper["lambda1"].as_f64().unwrap_or(1.0),
                ibot_weight: if patches { number(hyper, "lambda2") } else { 0.0 },
                koleo_weight: 0.0,
                student_temp: number(hyper, "student_temp"),
                centering: Centering::Softmax,
                center_momentum: number(hyper, "center_momentum"),
                patch_center: CenterOver::All,
                ..LossConfig::default()
            },
            optim: OptimConfig {
                clip_norm: number(hyper, "clip"),
                clip: Clip::Parameter,
                layerwise_decay: 1.0,
                patch_embed_lr_mult: 1.0,
                freeze: Freeze::Gradient,
                ..OptimConfig::default()
            },
        }
    }
}

/// What DINOv2 and DINOv3 write in the same way.
fn configured(cfg: &Value) -> (LossConfig, OptimConfig) {
    let (dino, ibot, optim) = (&cfg["dino"], &cfg["ibot"], &cfg["optim"]);
    let centering = match cfg["train"]["centering"].as_str() {
        Some("sinkhorn_knopp") => Centering::Sinkhorn,
        Some("centering") => Centering::Softmax,
        other => panic!("`train.centering` is {other:?}"),
    };
    let loss = LossConfig {
        dino_weight: number(dino, "loss_weight"),
        // DINOv2 has no such option: it never takes these pairs.
        ignore_diagonal: dino["global_ignore_diagonal"].as_bool().unwrap_or(true),
        ibot_weight: number(ibot, "loss_weight"),
        koleo_weight: number(dino, "koleo_loss_weight"),
        // DINOv2 has neither.
        koleo_neighbours: dino["koleo_topk"].as_u64().unwrap_or(1) as usize,
        koleo_group: dino["koleo_distributed_loss_group_size"].as_u64().unwrap_or(0) as usize,
        gram: gram(&cfg["gram"]),
        centering,
        patch_center: CenterOver::Masked,
        ..LossConfig::default()
    };
    let optim = OptimConfig {
        beta1: number(optim, "adamw_beta1"),
        beta2: number(optim, "adamw_beta2"),
        clip_norm: number(optim, "clip_grad"),
        clip: Clip::Submodule,
        layerwise_decay: number(optim, "layerwise_decay"),
        patch_embed_lr_mult: number(optim, "patch_embed_lr_mult"),
        freeze: Freeze::Lr,
        ..OptimConfig::default()
    };
    (loss, optim)
}

/// DINOv3's table `gram`; DINOv2 has none.
fn gram(gram: &Value) -> GramConfig {
    let flag = |key: &str| gram[key].as_bool().unwrap_or_else(|| panic!("`gram.{key}` is {}", gram[key]));
    if gram.is_null() || !flag("use_loss") {
        return GramConfig::default();
    }
    GramConfig {
        weight: number(gram, "loss_weight"),
        teacher: if flag("ema_teacher") { EMA.into() } else { "a file".into() },
        normalize: flag("normalized"),
        per_image: flag("img_level"),
        negatives: match (flag("remove_neg"), flag("remove_only_teacher_neg")) {
            (false, false) => Negatives::Keep,
            (true, _) => Negatives::Remove,
            (false, true) => Negatives::RemoveTeacher,
        },
        tokens: match gram["tokens_used"].as_str() {
            Some("all") => GramTokens::All,
            Some("masked") => GramTokens::Masked,
            Some("unmasked") => GramTokens::Unmasked,
            other => panic!("`gram.tokens_used` is {other:?}"),
        },
        resize: match gram["global_teacher_resize_method"].as_str() {
            Some("bicubic") => Filter::Bicubic,
            Some("bilinear") => Filter::Bilinear,
            other => panic!("`gram.global_teacher_resize_method` is {other:?}"),
        },
        antialias: flag("global_teacher_resize_antialias"),
        ..GramConfig::default()
    }
}

/// When the reference copies its teacher into the Gram teacher.
fn gram_refresh(fixture: &Fixture) -> GramRefresh {
    let gram = &fixture.hyper()["cfg"]["gram"];
    if gram["use_loss"].as_bool() != Some(true) || gram["rep_update"].as_bool() != Some(true) {
        return GramRefresh::default();
    }
    let count = |key: &str| gram[key].as_u64().unwrap_or(0);
    GramRefresh {
        snapshot: false,
        from: count("it_first_update"),
        every: count("update_frequency"),
        max: count("max_updates"),
    }
}

/// `cfg.student` with the sizes of `arch`.
fn model(hyper: &Value) -> Value {
    let mut model = hyper["cfg"]["student"].clone();
    for (key, value) in hyper["arch"].as_object().expect("`arch`") {
        model[key] = value.clone();
    }
    assert_eq!(model["drop_path"].as_f64().unwrap_or(0.0), 0.0, "the fixtures record no draws of stochastic depth");
    assert_eq!(
        model["drop_path_rate"].as_f64().unwrap_or(0.0),
        0.0,
        "the fixtures record no draws of stochastic depth"
    );
    model
}

/// The side of the images that the position table was made for.
fn img_size(fixture: &Fixture, model: &Value) -> Value {
    let positions = fixture.shape("w.student.backbone.pos_embed")[1] - 1;
    let patch_size = model["patch_size"].as_u64().expect("`patch_size`");
    json!(positions.isqrt() as u64 * patch_size)
}

/// DINO's backbone has no mask token.
fn masked(fixture: &Fixture, backbone: VitConfig) -> VitConfig {
    masked_by(fixture, "w.student.backbone.", backbone)
}

fn masked_by(fixture: &Fixture, weights: &str, mut backbone: VitConfig) -> VitConfig {
    let has = |name: &str| fixture.has(&format!("{weights}{name}"));
    backbone.mask_token = has("mask_token") || has("masked_embed");
    backbone
}

/// The values of step `i`, counted from 0.
pub(crate) fn scheduled(fixture: &Fixture, i: usize) -> Scheduled {
    let step = &fixture.json()["steps"][i];
    let lr = number(step, "lr");
    let last_layer_frozen = match step["last_layer_lr"].as_f64() {
        Some(last_layer_lr) => last_layer_lr != lr,
        // DINO and iBOT take the gradient away for some epochs instead.
        None => number(step, "epoch") < number(fixture.hyper(), "freeze"),
    };
    Scheduled {
        step: i as u64,
        lr,
        last_layer_frozen,
        backbone_frozen: false,
        weight_decay: number(step, "wd"),
        teacher_momentum: number(step, "mom"),
        teacher_temp: number(step, "teacher_temp"),
        teacher_patch_temp: first(step, &["teacher_temp2", "teacher_temp"]).as_f64().expect("a temperature"),
        refresh_gram_teacher: gram_refresh(fixture).is_due(i as u64 + 1),
    }
}

/// The loss settings of step `i`: DINOv3 schedules the weights of the local crops and of the Gram loss.
pub(crate) fn loss_at(fixture: &Fixture, loss: &LossConfig, i: usize) -> LossConfig {
    let stated = &fixture.json()["steps"][i]["loss_dict"];
    let mut loss = loss.clone();
    loss.local_weight = stated["dino_local_loss_weight"].as_f64().unwrap_or(1.0);
    loss.gram.weight = stated["gram_loss_weight"].as_f64().unwrap_or(loss.gram.weight);
    loss
}
