//! Files made to do harm: none panics, runs anything, or takes memory out of proportion.
//!
//! A test binary of its own, with one test: it counts every allocation of the process.

#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use dinoxide_exchange::{Format, export};
use dinoxide_model::Architecture;
use dinoxide_model::weights::{DESCRIPTION_KEY, backbone_file};
use dinoxide_random::{Purpose, stream};
use peak_alloc::PeakAlloc;
use rand::RngExt;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use support::{backbone, contents, convnext, description, dinov2, open};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const MIB: usize = 1 << 20;

/// Loads `path`, which may succeed or fail, within `limit` bytes; gives the error's message.
#[track_caller]
fn attempt(path: &Path, limit: usize, what: &str) -> Option<String> {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let outcome = open(path).map(drop).map_err(|e| e.to_string()).err();
    let taken = MEMORY.peak_usage().saturating_sub(before);
    assert!(taken <= limit, "{what}: took {} MiB: {outcome:?}", taken / MIB);
    outcome
}

fn archive(entries: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut out = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        out.start_file(*name, SimpleFileOptions::default().compression_method(method)).expect("an entry");
        out.write_all(bytes).expect("bytes");
    }
    out.finish().expect("an archive").into_inner()
}

/// A PyTorch file with a pickle and one storage.
fn pytorch(pickle: &[u8]) -> Vec<u8> {
    let entries: [(&str, &[u8]); 3] = [("a/data.pkl", pickle), ("a/data/0", &[0; 64]), ("a/version", b"3\n")];
    archive(&entries, CompressionMethod::Stored)
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn long(value: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &value.to_le_bytes()].concat()
}

/// `{name: _rebuild_tensor_v2(storage of `elements`, offset, shape, strides, …)}`.
fn tensor(name: &str, elements: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let tuple =
        |values: &[i64]| [b"(".to_vec(), values.iter().flat_map(|v| long(*v)).collect(), b"t".to_vec()].concat();
    let storage = [
        b"((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        long(elements),
        b"tQ".to_vec(),
    ];
    [
        b"\x80\x02}(".to_vec(),
        text(name),
        b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(),
        storage.concat(),
        long(offset),
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtRu.".to_vec(),
    ]
    .concat()
}

/// `[object] * many` and so on, nested by memo.
fn laughs() -> Vec<u8> {
    let mut out = b"\x80\x02]q\x00(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01e".to_vec();
    for level in 1..60u8 {
        out.extend([b']', b'q', level, b'(']);
        out.extend([b'h', level - 1].repeat(10));
        out.push(b'e');
    }
    out.push(b'.');
    out
}

fn crafted(place: &Path) -> usize {
    let marker = place.join("executed");
    let system = |module: &str, function: &str| {
        let command = text(&format!("touch {}", marker.display()));
        [format!("c{module}\n{function}\n(").into_bytes(), command, b"tR".to_vec()].concat()
    };
    let calls = [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("subprocess", "getoutput")];
    let mut pickles: Vec<(String, Vec<u8>)> = Vec::new();
    for (module, function) in calls {
        let call = system(module, function);
        pickles.push((format!("{module}.{function}"), [&b"\x80\x02"[..], &call, b"."].concat()));
        let named = [&b"\x80\x02}("[..], &text("cls_token"), &call, b"u."].concat();
        pickles.push((format!("{module}.{function} as a tensor"), named));
        let as_storage = [&b"\x80\x02}("[..], &text("cls_token"), &call, b"Qu."].concat();
        pickles.push((format!("{module}.{function} as a storage"), as_storage));
    }
    let max = i64::MAX;
    let tensors = [
        ("more elements than there are", tensor("cls_token", 1 << 40, 0, &[1, 1, 1 << 40], &[1 << 40, 1 << 40, 1])),
        ("as many elements as can be written", tensor("cls_token", max, 0, &[1, 1, max], &[1, 1, 1])),
        ("one element everywhere", tensor("cls_token", 16, 0, &[1, 1 << 14, 1 << 14], &[0, 0, 0])),
        ("overlapping rows", tensor("cls_token", 16, 0, &[1, 1 << 20, 8], &[0, 0, 1])),
        ("strides that overflow", tensor("cls_token", 16, 0, &[2, 2, 2], &[max, max, max])),
        ("a shape that overflows", tensor("cls_token", 16, 0, &[max, max, max], &[0, 0, 0])),
        ("a negative shape", tensor("cls_token", 16, 0, &[-1, 1, 16], &[16, 16, 1])),
        ("negative strides", tensor("cls_token", 16, 15, &[1, 1, 16], &[16, 16, -1])),
        ("a negative offset", tensor("cls_token", 16, -4, &[1, 1, 16], &[16, 16, 1])),
        ("an offset past the end", tensor("cls_token", 16, max, &[1, 1, 16], &[16, 16, 1])),
        ("a negative count", tensor("cls_token", -16, 0, &[1, 1, 16], &[16, 16, 1])),
        ("fewer strides than axes", tensor("cls_token", 16, 0, &[1, 1, 16], &[1])),
        ("4096 axes", tensor("cls_token", 16, 0, &[1; 4096], &[1; 4096])),
        ("a block of a great index", tensor("blocks.18446744073709551615.norm1.weight", 16, 0, &[16], &[1])),
        ("an empty name", tensor("", 16, 0, &[16], &[1])),
        ("a name of nothing but dots", tensor("....cls_token", 16, 0, &[1, 1, 16], &[16, 16, 1])),
    ];
    pickles.extend(tensors.map(|(what, pickle)| (what.to_owned(), pickle)));
    let opcodes: [(&str, Vec<u8>); 15] = [
        ("nothing", vec![]),
        ("a stop", b".".to_vec()),
        ("a number", b"\x80\x02K\x01.".to_vec()),
        ("a great memo index", b"\x80\x02}r\xff\xff\xff\xff.".to_vec()),
        ("a memo index that is not there", b"\x80\x02j\xff\xff\xff\xff.".to_vec()),
        ("a text longer than can be", [&b"\x80\x04\x8d"[..], &u64::MAX.to_le_bytes(), b"x."].concat()),
        ("a text longer than there is", [&b"\x80\x02X"[..], &u32::MAX.to_le_bytes(), b"x."].concat()),
        ("bytes longer than there are", [&b"\x80\x04\x8e"[..], &(1u64 << 40).to_le_bytes(), b"x."].concat()),
        ("a frame longer than there is", [&b"\x80\x04\x95"[..], &u64::MAX.to_le_bytes(), b"}."].concat()),
        ("an integer longer than there is", [&b"\x80\x02\x8b"[..], &i32::MAX.to_le_bytes(), b"\x01."].concat()),
        (
            "a million nested lists",
            [b"\x80\x02".to_vec(), b"]".repeat(MIB), b"a".repeat(MIB - 1), b".".to_vec()].concat(),
        ),
        ("a million nested tuples", [b"\x80\x02)".to_vec(), b"\x85".repeat(MIB), b".".to_vec()].concat()),
        ("a million marks", [b"\x80\x02".to_vec(), b"(".repeat(MIB), b".".to_vec()].concat()),
        ("a billion laughs", laughs()),
        ("a dictionary in itself", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.".to_vec()),
    ];
    pickles.extend(opcodes.map(|(what, pickle)| (what.to_owned(), pickle)));

    let path = place.join("crafted.pth");
    for (what, pickle) in &pickles {
        fs::write(&path, pytorch(pickle)).expect("written");
        // A parser's copies of memoized objects are what takes most; it stops at 64 MiB or a million of them.
        assert!(attempt(&path, 256 * MIB, what).is_some(), "{what}: loaded");
    }
    assert!(!marker.exists(), "something was executed");

    let pickle = tensor("cls_token", 16, 0, &[1, 1, 16], &[16, 16, 1]);
    let great = b"]".repeat(9 * MIB);
    let archives = [
        (
            "compressed",
            archive(&[("a/data.pkl", &pickle), ("a/data/0", &[0; 64])], CompressionMethod::Deflated),
            "compressed",
        ),
        ("a great pickle", pytorch(&great), "at most 8388608 are read"),
        ("no pickle", archive(&[("a/version", b"3\n")], CompressionMethod::Stored), "data.pkl"),
        ("no storage", archive(&[("a/data.pkl", &pickle)], CompressionMethod::Stored), "data/0"),
        ("no entries", archive(&[], CompressionMethod::Stored), "header"),
        ("a start alone", b"PK\x03\x04".to_vec(), "not a readable PyTorch file"),
    ];
    let archive_count = archives.len();
    for (what, bytes, reason) in archives {
        fs::write(&path, bytes).expect("written");
        let message = attempt(&path, 64 * MIB, what).unwrap_or_else(|| panic!("{what}: loaded"));
        assert!(message.contains(reason), "{what}: {message}");
    }

    let header =
        |json: &str, data: usize| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat();
    let one = |shape: &str, offsets: &str| {
        header(&format!("{{\"cls_token\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}"), 16)
    };
    let described = |change: &dyn Fn(&mut serde_json::Value)| {
        let backbone = backbone(dinov2(), 1);
        let mut file = backbone_file(&backbone, &description(&backbone));
        let mut value: serde_json::Value = serde_json::from_str(&file.metadata[DESCRIPTION_KEY]).expect("JSON");
        change(&mut value);
        file.metadata.insert(DESCRIPTION_KEY.to_owned(), value.to_string());
        file.to_bytes()
    };
    let files = [
        ("a great header", u64::MAX.to_le_bytes().to_vec()),
        ("a header longer than the file", [&(1u64 << 30).to_le_bytes()[..], b"{}"].concat()),
        ("deep JSON", header(&"[".repeat(1 << 17), 0)),
        ("a shape that overflows", one("[18446744073709551615,18446744073709551615,4]", "[0,16]")),
        ("a shape that is not there", one("[1,1,4000000000]", "[0,16000000000]")),
        ("offsets backwards", one("[1,1,4]", "[16,0]")),
        ("offsets past the end", one("[1,1,8]", "[16,48]")),
        ("negative offsets", one("[1,1,4]", "[-16,0]")),
        ("a great depth", described(&|v| v["architecture"]["depth"] = (1u64 << 20).into())),
        ("a great width", described(&|v| v["architecture"]["embed_dim"] = (1u64 << 20).into())),
        ("a great grid", described(&|v| v["architecture"]["learned"]["grid"] = (1u64 << 12).into())),
        ("many registers", described(&|v| v["architecture"]["register_tokens"] = (1u64 << 12).into())),
        ("a width of nothing", described(&|v| v["architecture"]["embed_dim"] = 0.into())),
        ("another family", described(&|v| v["architecture"]["family"] = "cnn".into())),
        ("a key too many", described(&|v| v["surprise"] = 1.into())),
        ("a description of nothing", described(&|v| *v = serde_json::Value::Null)),
    ];
    let file_count = files.len();
    let path = place.join("crafted.safetensors");
    for (what, bytes) in files {
        fs::write(&path, bytes).expect("written");
        assert!(attempt(&path, 64 * MIB, what).is_some(), "{what}: loaded");
    }

    let folder = place.join("sharded");
    fs::create_dir(&folder).expect("a folder");
    let indices = ["../crafted.safetensors", "/etc/passwd", "", "..", "a/b.safetensors", "missing.safetensors"];
    for file in indices {
        let index = serde_json::json!({ "weight_map": { "cls_token": file } });
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).expect("written");
        let message = attempt(&folder, MIB, file).unwrap_or_else(|| panic!("{file}: loaded"));
        let inside = file == "missing.safetensors";
        assert_eq!(message.contains("which is not the name of a file in the folder"), !inside, "{file}: {message}");
    }
    pickles.len() + archive_count + file_count + indices.len()
}

/// Changes a file at random, mostly where its structure is.
fn mutate(bytes: &mut Vec<u8>, structure: &[usize], rng: &mut impl rand::Rng) {
    let at = |rng: &mut dyn FnMut(usize) -> usize, length: usize| rng(length.max(1));
    let mut below = |limit: usize| rng.random_range(0..limit);
    match below(8) {
        0 => bytes.truncate(at(&mut below, bytes.len())),
        1 => {
            // A length, a count or an offset.
            let value = [0, 1, 0x7fff_ffff_ffff_ffff, u64::MAX, 1 << 40, 0xffff_ffff][below(6)];
            let start = structure[below(structure.len())].min(bytes.len().saturating_sub(8));
            let width = [2, 4, 8][below(3)].min(bytes.len() - start);
            bytes[start..start + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        2 => {
            let (from, to) = (at(&mut below, bytes.len()), structure[below(structure.len())]);
            let length = below(64).min(bytes.len() - from);
            let part = bytes[from..from + length].to_vec();
            bytes.splice(to.min(bytes.len())..to.min(bytes.len()), part);
        }
        3 => {
            let from = structure[below(structure.len())].min(bytes.len());
            let to = (from + below(64)).min(bytes.len());
            bytes.drain(from..to);
        }
        _ => {
            for _ in 0..1 + below(8) {
                let place = structure[below(structure.len())].min(bytes.len() - 1);
                bytes[place] ^= 1 << below(8);
            }
        }
    }
}

fn mutations(place: &Path) -> (usize, usize) {
    let backbones = [backbone(dinov2(), 1), backbone(Architecture::from(convnext()), 2)];
    let mut originals = Vec::new();
    for backbone in &backbones {
        for format in [Format::Safetensors, Format::Meta] {
            let path = place.join("original");
            export(backbone, &description(backbone), format, &path).expect("an export");
            originals.push(fs::read(&path).expect("a file"));
            if format == Format::Safetensors {
                // Without a fingerprint, so that changes get further.
                let mut file = contents(&path);
                file.metadata.clear();
                originals.push(file.to_bytes());
            }
            fs::remove_file(&path).expect("removed");
        }
    }
    let mut count = 0;
    let mut refused = 0;
    for seed in 0..600u64 {
        let mut rng = stream(seed, Purpose::Evaluation, 0, 0);
        let mut bytes = originals[seed as usize % originals.len()].clone();
        let structure = structure(&bytes);
        for _ in 0..rng.random_range(1..3) {
            if !bytes.is_empty() {
                mutate(&mut bytes, &structure, &mut rng);
            }
        }
        let path = place.join("mutated");
        fs::write(&path, &bytes).expect("written");
        let limit = 24 * MIB + 16 * bytes.len();
        refused += usize::from(attempt(&path, limit, &format!("seed {seed}")).is_some());
        count += 1;
    }
    (count, refused)
}

/// Places that are not values of tensors: a header, or all of an archive but its larger entries.
fn structure(bytes: &[u8]) -> Vec<usize> {
    if let Ok(mut archive) = ZipArchive::new(Cursor::new(bytes)) {
        let mut values = vec![false; bytes.len()];
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).expect("an entry");
            let start = entry.data_start().expect("its place") as usize;
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).expect("bytes");
            if entry.name().expect("a name").contains("/data/") {
                values[start..start + contents.len()].fill(true);
            }
        }
        return (0..bytes.len()).filter(|&i| !values[i]).collect();
    }
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    (0..8 + header).collect()
}

#[test]
fn hostile_files_are_refused_within_bounds() {
    let place = tempfile::tempdir().expect("a folder");
    assert_eq!(crafted(place.path()), 71);
    let (count, refused) = mutations(place.path());
    assert_eq!(count, 600);
    // Some changes are harmless: spaces in a header, names of entries that nobody asks for.
    assert!(refused > 450, "only {refused} of {count} were refused");
}
