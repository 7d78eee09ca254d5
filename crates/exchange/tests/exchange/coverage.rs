//! Every tensor is accounted for, and the message says which is not.

use std::fs;
use std::path::PathBuf;

use dinoxide_exchange::{Format, export};
use dinoxide_model::weights::{DESCRIPTION_KEY, Weight, WeightFile, backbone_file};
use tempfile::TempDir;

use crate::support::{backbone, contents, description, dino, dinov2, dinov3, open, refusal};

/// A weight file of ours, changed.
fn written(change: impl FnOnce(&mut WeightFile)) -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("weights.safetensors");
    let backbone = backbone(dinov2(), 1);
    let mut file = backbone_file(&backbone, &description(&backbone));
    change(&mut file);
    file.write(&path).expect("written");
    (place, path)
}

fn transpose(weight: &mut Weight) {
    let [rows, columns] = weight.shape[..] else { panic!("{:?}", weight.shape) };
    weight.values = (0..rows * columns).map(|i| weight.values[i % rows * columns + i / rows]).collect();
    weight.shape = vec![columns, rows];
}

#[test]
fn missing_extra_and_misshaped_tensors_are_all_listed() {
    let (_place, path) = written(|file| {
        file.tensors.remove("blocks.1.norm2.bias");
        file.tensors.insert("blocks.0.attn.gate.weight".into(), Weight { shape: vec![2], values: vec![0.0; 2] });
        transpose(file.tensors.get_mut("blocks.0.mlp.fc1.weight").expect("there"));
    });
    assert_eq!(
        refusal(&path),
        "the tensors do not cover the model exactly\n  `blocks.0.mlp.fc1.weight` is [128, 256], the model expects [256, 128]\n  \
         missing: `blocks.1.norm2.bias` [128]\n  extra: `blocks.0.attn.gate.weight`"
    );
}

#[test]
fn a_transposed_square_matrix_is_found_by_the_fingerprint() {
    let (_place, path) = written(|file| transpose(file.tensors.get_mut("blocks.1.attn.proj.weight").expect("there")));
    let message = refusal(&path);
    assert!(
        message.starts_with("the backbone does not compute what it did when the file was written: statistic "),
        "{message}"
    );
    assert!(message.ends_with(
        "hint: the file was damaged or changed after it was written; take the original, or export it again"
    ));
}

#[test]
fn one_flipped_bit_is_found_by_the_checksum() {
    let (_place, path) = written(|file| {
        let value = &mut file.tensors.get_mut("blocks.0.mlp.fc2.weight").expect("there").values[5];
        *value = f32::from_bits(value.to_bits() ^ 1);
    });
    let message = refusal(&path);
    assert!(message.starts_with("the parameters are not those that were written: their CRC-32 is "), "{message}");
}

#[test]
fn the_same_holds_in_other_formats() {
    let backbone = backbone(dinov3(), 2);
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("hf");
    export(&backbone, &description(&backbone), Format::HuggingFace, &path).expect("an export");
    let file = path.join("model.safetensors");
    let original = contents(&file);
    let with = |change: &dyn Fn(&mut WeightFile)| {
        let mut changed = original.clone();
        change(&mut changed);
        changed.write(&file).expect("written");
        refusal(&path)
    };
    let message = with(&|file| transpose(file.tensors.get_mut("layer.0.attention.o_proj.weight").expect("there")));
    assert!(message.starts_with("the backbone does not compute what it did"), "{message}");
    let message = with(&|file| drop(file.tensors.remove("layer.2.attention.k_proj.weight")));
    assert_eq!(message, "block 2: the weight of queries is there, of keys missing, of values there");
    let message = with(&|file| {
        file.tensors.remove("layer.1.norm1.weight");
        file.tensors.insert("layer.1.bonus".into(), Weight { shape: vec![1], values: vec![0.0] });
    });
    assert_eq!(
        message,
        "the tensors do not cover the model exactly\n  missing: `blocks.1.norm1.weight` [64]\n  extra: `layer.1.bonus`"
    );
}

#[test]
fn other_types_than_floats_are_named() {
    let (_place, path) = written(|_| {});
    let bytes = fs::read(&path).expect("a file");
    let name = "\"cls_token\":{\"dtype\":\"F32\"";
    let at = bytes.windows(name.len()).position(|w| w == name.as_bytes()).expect("its entry");
    let mut changed = bytes.clone();
    changed[at + name.len() - 4] = b'I';
    fs::write(&path, changed).expect("written");
    assert_eq!(refusal(&path), "tensors that are not of a floating-point type\n  `cls_token` is I32");
}

#[test]
fn files_without_a_known_backbone_say_what_they_begin_with() {
    let (_place, path) = written(|file| {
        file.tensors = [("conv1.weight", 3), ("fc.bias", 2)]
            .map(|(name, count)| (name.to_owned(), Weight { shape: vec![count], values: vec![0.0; count] }))
            .into();
        file.metadata.clear();
    });
    assert_eq!(
        refusal(&path),
        "no ViT or ConvNeXt of a kind that is known here is in it; its 2 tensors begin with `conv1.weight`, `fc.bias`"
    );
}

#[test]
fn a_width_that_does_not_imply_the_heads_is_refused() {
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("weights.safetensors");
    let config = dinoxide_model::VitConfig { embed_dim: 24, num_heads: 3, ..dinov2() };
    let backbone = backbone(config, 1);
    let mut file = backbone_file(&backbone, &description(&backbone));
    file.metadata.remove(DESCRIPTION_KEY);
    file.write(&path).expect("written");
    assert_eq!(
        refusal(&path),
        "the number of heads is not in it, and 24 is no multiple of 64, the width of a head in released models\n\nhint: a \
         Hugging Face folder has the number in `config.json`"
    );
}

#[test]
fn a_file_without_a_fingerprint_loads_with_a_note() {
    let (_place, path) = written(|file| {
        let backbone = backbone(dinov2(), 1);
        file.metadata = description(&backbone).metadata();
    });
    let loaded = open(&path).expect("loads");
    assert_eq!(loaded.verdict, dinoxide_exchange::Verdict::Absent);
    assert_eq!(
        loaded.notes,
        ["no fingerprint: whether the backbone computes what it did where it comes from is not checked"]
    );
}

#[test]
fn folders_and_old_files_say_what_to_do() {
    let place = tempfile::tempdir().expect("a folder");
    let error = dinoxide_exchange::load(place.path(), &burn::tensor::Device::flex()).expect_err("no weights");
    assert!(error.is_usage() && error.to_string().contains("a folder without `model.safetensors`"), "{error}");
    // The directory of a run stands for its weights.
    let backbone = backbone(dino(), 4);
    let written = backbone_file(&backbone, &description(&backbone)).write(&place.path().join("teacher.safetensors"));
    written.expect("written");
    let loaded = open(place.path()).expect("a backbone");
    assert!(loaded.format.contains("run directory"), "{}", loaded.format);
    let old = place.path().join("old.pth");
    fs::write(&old, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.").expect("written");
    assert_eq!(
        refusal(&old),
        "a pickle that is not in a zip archive, as PyTorch wrote before 1.6\n\nhint: save it again with a current PyTorch: \
         `torch.save(torch.load(path, map_location=\"cpu\"), new_path)`"
    );
}
