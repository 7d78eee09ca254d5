//! `dinoxide eval copies`: the originals of edited copies found among many images.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinoxide_evaluation::copies::descriptor::{Described, GEM_EXPONENT, Whitening};
use dinoxide_evaluation::copies::edits::{Edit, Edited};
use dinoxide_evaluation::copies::{Copies, CopiesConfig, copies};
use dinoxide_evaluation::{Features, Token};

use super::check_distinct;
use super::frozen::Frozen;
use super::outcome::{Metric, Outcome};
use super::sets::Set;
use crate::Usage;

#[derive(clap::Args)]
pub(crate) struct Task {
    /// Images to find: a folder, or `synthetic`
    #[arg(long, value_name = "DIR")]
    originals: String,
    /// Further images to search, of which no copy is looked for; a folder, or `synthetic`
    #[arg(long, value_name = "DIR")]
    distractors: Option<String>,
    /// Copies to find the originals of; the name of each begins with that of its original. Without it, copies are made
    #[arg(long, value_name = "DIR")]
    copies: Option<String>,
    /// Which copy is of which original, a line `COPY,ORIGINAL` each, paths below the two folders; a copy of nothing has no
    /// original
    #[arg(long, value_name = "FILE", requires = "copies")]
    pairs: Option<PathBuf>,
    /// Edits that make copies, one of each original by each
    #[arg(long, value_name = "EDIT,EDIT,…", value_delimiter = ',', value_parser = edit, default_value = "crop,flip,rotation,color,blur,jpeg,overlay,strong", conflicts_with = "copies")]
    edits: Vec<Edit>,
    /// Seed of the edits
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Whiten descriptors as these images say, which should be none of the others; a folder, or `synthetic`
    #[arg(long, value_name = "DIR")]
    whiten: Option<String>,
    /// Coordinates that whitening leaves; default: as many as the images allow
    #[arg(long, value_name = "N", requires = "whiten")]
    whiten_dims: Option<usize>,
}

fn edit(name: &str) -> Result<Edit, String> {
    Edit::ALL.into_iter().find(|edit| edit.name() == name).ok_or_else(|| {
        let names = Edit::ALL.map(Edit::name).join(", ");
        format!("no edit has this name, the edits are {names}")
    })
}

/// Copies of one kind, with the original of each.
struct Kind {
    name: String,
    set: Set,
    originals: Vec<Option<usize>>,
}

impl super::measurement::Task for Task {
    const BLOCKS: usize = 1;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        check_distinct("copies", "--edits", &self.edits.iter().map(|edit| edit.name()).collect::<Vec<_>>())?;
        let originals = Set::open(&self.originals, &[])?;
        let distractors = self.distractors.as_ref().map(|spec| Set::open(spec, &[])).transpose()?;
        let whiten = self.whiten.as_ref().map(|spec| Set::open(spec, &[])).transpose()?;
        if self.distractors.as_ref() == Some(&self.originals) {
            return Err(Usage(anyhow::anyhow!(
                "{}: originals and distractors are the same images, so a copy would be found twice",
                self.originals
            ))
            .into());
        }
        let kinds = self.kinds(&originals)?;

        let all = |set: &Set| (0..set.source.len()).collect::<Vec<_>>();
        let found = frozen.descriptors(&originals, &all(&originals))?;
        let mut gallery = found.features;
        let rows: HashMap<usize, usize> = found.indices.iter().enumerate().map(|(row, &index)| (index, row)).collect();
        if let Some(distractors) = &distractors {
            gallery = stacked(&[gallery, frozen.descriptors(distractors, &all(distractors))?.features])?;
        }
        let mut asked = Asked::default();
        for (number, kind) in kinds.iter().enumerate() {
            // Copies of images that cannot be read have nothing to be found.
            let known = |&index: &usize| kind.originals[index].is_none_or(|original| rows.contains_key(&original));
            let indices: Vec<usize> = all(&kind.set).into_iter().filter(known).collect();
            let found = frozen.descriptors(&kind.set, &indices)?;
            asked.add(found, number, |index| kind.originals[index].map(|original| rows[&original]));
        }
        let mut features = stacked(&asked.features)?;
        let mut whitening = None;
        if let Some(set) = &whiten {
            let learned = frozen.descriptors(set, &all(set))?.features;
            let most = learned.dim().min(learned.rows() - 1);
            let white = Whitening::learn(&learned, self.whiten_dims.unwrap_or(most))?;
            (gallery, features) = (white.apply(&gallery)?, white.apply(&features)?);
            whitening = Some((set.name.clone(), white.dims()));
        }

        let names: Vec<String> = kinds.iter().map(|kind| kind.name.clone()).collect();
        let config = CopiesConfig {
            copies: self.copies.clone().unwrap_or_else(|| format!("{}, seed {}", names.join(", "), self.seed)),
            gem_exponent: GEM_EXPONENT,
            whitening,
        };
        let searched = match &self.distractors {
            Some(distractors) => format!("{} and {distractors}", self.originals),
            None => self.originals.clone(),
        };
        let val = self.copies.as_ref().unwrap_or(&self.originals);
        let source = frozen.source(&searched, val, vec![Token::Cls, Token::PatchGem], 1);
        let copies_of = Copies { features, originals: asked.originals, kind: asked.kind, kinds: names };
        let report = copies(&gallery, &copies_of, &source, &config, &frozen.device)?;
        let scores = &report.scores;
        let mut data = format!(
            "{} copies of {} originals among {} images",
            scores.queries,
            originals.source.len(),
            scores.gallery
        );
        if scores.without_original > 0 {
            data = format!("{data}, {} images that are no copies", scores.without_original);
        }
        let mut outcome = Outcome::new("copies", data, &report)?;
        outcome.metrics = vec![
            Metric::percent("micro-AP", scores.micro_ap, None),
            Metric::percent("mAP", scores.map, scores.interval),
            Metric::percent("original first", scores.first, scores.first_interval),
        ];
        let by_kind = scores.by_kind.iter();
        outcome.metrics.extend(by_kind.map(|of| Metric::percent(format!("mAP, {}", of.kind), of.map, of.interval)));
        Ok(outcome)
    }
}

/// Descriptors of several sets, one below the other.
fn stacked(parts: &[Features]) -> anyhow::Result<Features> {
    let rows = parts.iter().map(Features::rows).sum();
    let values = parts.iter().flat_map(|part| part.values()).copied().collect();
    Ok(Features::new(rows, parts[0].dim(), values)?)
}

/// What is collected of the copies.
#[derive(Default)]
struct Asked {
    features: Vec<Features>,
    originals: Vec<Option<usize>>,
    kind: Vec<usize>,
}

impl Asked {
    fn add(&mut self, found: Described, kind: usize, original: impl Fn(usize) -> Option<usize>) {
        self.originals.extend(found.indices.iter().map(|&index| original(index)));
        self.kind.extend(found.indices.iter().map(|_| kind));
        self.features.push(found.features);
    }
}

impl Task {
    /// The copies: those of the folder, or what the edits make.
    fn kinds(&self, originals: &Set) -> anyhow::Result<Vec<Kind>> {
        if let Some(spec) = &self.copies {
            let set = Set::open(spec, &[])?;
            let originals = match &self.pairs {
                Some(path) => listed(path, &set, originals)?,
                None => by_name(&set, originals)?,
            };
            return Ok(vec![Kind { name: spec.clone(), set, originals }]);
        }
        let kind = |edit: &Edit| {
            let source = Edited { source: Arc::clone(&originals.source), edit: *edit, seed: self.seed };
            let name = format!("{}, {}", originals.name, edit.name());
            let of = (0..originals.source.len()).map(Some).collect();
            Kind { name: edit.name().to_owned(), set: Set { name, source: Arc::new(source) }, originals: of }
        };
        Ok(self.edits.iter().map(kind).collect())
    }
}

/// The originals that a file names, in the order of the copies.
fn listed(path: &Path, copies: &Set, originals: &Set) -> anyhow::Result<Vec<Option<usize>>> {
    let wrong = |message: String| Usage(anyhow::anyhow!("{}: {message}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let numbers = |set: &Set| -> HashMap<String, usize> {
        (0..set.source.len()).map(|index| (set.source.id(index), index)).collect()
    };
    let (by_copy, by_original) = (numbers(copies), numbers(originals));
    let mut found = vec![None; copies.source.len()];
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let Some((copy, original)) = line.split_once(',').filter(|(_, original)| !original.contains(',')) else {
            return Err(wrong(format!("line {number}: `{line}` is not `COPY,ORIGINAL`")).into());
        };
        let (copy, original) = (copy.trim(), original.trim());
        let find = |known: &HashMap<String, usize>, name: &str, set: &Set| {
            known.get(name).copied().ok_or_else(|| wrong(format!("line {number}: `{name}` is not in {}", set.name)))
        };
        let at = find(&by_copy, copy, copies)?;
        let of = if original.is_empty() { None } else { Some(find(&by_original, original, originals)?) };
        if found[at].replace(of).is_some() {
            return Err(wrong(format!("line {number}: `{copy}` was listed before")).into());
        }
    }
    if let Some(missing) = found.iter().position(Option::is_none) {
        let (name, count) = (copies.source.id(missing), found.iter().filter(|one| one.is_none()).count());
        return Err(wrong(format!(
            "`{name}` is not listed, one of {count}\n\nhint: write `{name},` for an image that is no copy"
        ))
        .into());
    }
    Ok(found.into_iter().flatten().collect())
}

/// The originals whose names those of the copies begin with. Of several, the longest name counts: `11-crop` is of `11`, not of
/// `1`.
fn by_name(copies: &Set, originals: &Set) -> anyhow::Result<Vec<Option<usize>>> {
    let usage = |message: String| Usage(anyhow::anyhow!("{message}"));
    let stem = |id: &str| Path::new(id).file_stem().map_or(String::new(), |stem| stem.to_string_lossy().into_owned());
    let mut known = HashMap::new();
    for index in 0..originals.source.len() {
        let id = originals.source.id(index);
        if let Some(other) = known.insert(stem(&id), index) {
            return Err(usage(format!(
                "{}: `{}` and `{id}` have one name, which says no copy's original\n\nhint: `--pairs FILE` lists the originals",
                originals.name,
                originals.source.id(other)
            ))
            .into());
        }
    }
    let find = |index: usize| {
        let name = stem(&copies.source.id(index));
        // Up to the end, or to a sign that no name goes on with.
        let ends = name.char_indices().filter(|(_, c)| !c.is_alphanumeric()).map(|(at, _)| at).chain([name.len()]);
        ends.filter_map(|end| known.get(&name[..end]).copied()).next_back()
    };
    let found: Vec<Option<usize>> = (0..copies.source.len()).map(find).collect();
    if let Some(missing) = found.iter().position(Option::is_none) {
        let count = found.iter().filter(|one| one.is_none()).count();
        return Err(usage(format!(
            "{}: no original in {} has the name that `{}` begins with, and so for {count} of {}\n\nhint: `--pairs FILE` lists the originals",
            copies.name,
            originals.name,
            copies.source.id(missing),
            found.len()
        ))
        .into());
    }
    Ok(found)
}
