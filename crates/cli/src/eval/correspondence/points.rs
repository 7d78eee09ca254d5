//! Files of keypoints, boxes and pairs: lines of fields between commas. An image is named by its path below the folder.

use std::collections::HashMap;
use std::path::Path;

use dinoxide_evaluation::dense::keypoints::Points;
use dinoxide_evaluation::dense::transfer::Group;

use crate::Usage;
use crate::eval::sets::Set;

/// A file whose lines have `FIELDS` fields.
struct Lines<'a, const FIELDS: usize> {
    path: &'a Path,
    lines: Vec<(usize, [String; FIELDS])>,
}

impl<'a, const FIELDS: usize> Lines<'a, FIELDS> {
    fn read(path: &'a Path, what: &str) -> anyhow::Result<Self> {
        let wrong = |message: String| Usage(anyhow::anyhow!("{}: {message}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let fields: Vec<String> = line.split(',').map(|field| field.trim().to_owned()).collect();
            let fields = fields.try_into().map_err(|_| wrong(format!("line {number}: `{line}` is not `{what}`")))?;
            lines.push((number, fields));
        }
        if lines.is_empty() {
            return Err(wrong(format!("no line\n\nhint: write lines `{what}`")).into());
        }
        Ok(Self { path, lines })
    }

    fn wrong(&self, number: usize, message: &str) -> anyhow::Error {
        Usage(anyhow::anyhow!("{}: line {number}: {message}", self.path.display())).into()
    }

    fn number(&self, number: usize, text: &str) -> anyhow::Result<f64> {
        let value = text.parse::<f64>().ok().filter(|value| value.is_finite());
        value.ok_or_else(|| self.wrong(number, &format!("`{text}` is not a number")))
    }

    fn image(&self, number: usize, name: &str, known: &HashMap<String, usize>, set: &Set) -> anyhow::Result<usize> {
        let unknown = || self.wrong(number, &format!("image `{name}` is not in {}", set.name));
        known.get(name).copied().ok_or_else(unknown)
    }
}

fn by_id(set: &Set) -> HashMap<String, usize> {
    (0..set.source.len()).map(|index| (set.source.id(index), index)).collect()
}

/// The keypoints of each image of a set, and the longer sides of their boxes.
pub(super) fn read_points(path: &Path, boxes: Option<&Path>, set: &Set) -> anyhow::Result<Vec<Points>> {
    let known = by_id(set);
    let mut points = vec![Points::default(); set.source.len()];
    let file = Lines::<4>::read(path, "IMAGE,NAME,X,Y")?;
    for (number, [image, name, x, y]) in &file.lines {
        let at = [file.number(*number, x)?, file.number(*number, y)?];
        let index = file.image(*number, image, &known, set)?;
        if points[index].named.insert(name.clone(), at).is_some() {
            return Err(file.wrong(*number, &format!("keypoint `{name}` of `{image}` was listed before")));
        }
    }
    if let Some(path) = boxes {
        let file = Lines::<5>::read(path, "IMAGE,LEFT,TOP,RIGHT,BOTTOM")?;
        for (number, [image, edges @ ..]) in &file.lines {
            let mut values = [0.0; 4];
            for (value, edge) in values.iter_mut().zip(edges) {
                *value = file.number(*number, edge)?;
            }
            let [left, top, right, bottom] = values;
            if right <= left || bottom <= top {
                return Err(file.wrong(*number, "a box ends to the right of where it begins, and below"));
            }
            let index = file.image(*number, image, &known, set)?;
            if points[index].extent_px.replace((right - left).max(bottom - top)).is_some() {
                return Err(file.wrong(*number, &format!("`{image}` has a box before")));
            }
        }
        let without = |index: &usize| !points[*index].named.is_empty() && points[*index].extent_px.is_none();
        if let Some(index) = (0..points.len()).find(without) {
            let (path, id) = (path.display(), set.source.id(index));
            return Err(Usage(anyhow::anyhow!("{path}: no box of `{id}`, which has keypoints")).into());
        }
    }
    Ok(points)
}

/// The pairs of a file, a group for each source, in the order in which they come.
pub(super) fn listed_pairs(path: &Path, set: &Set) -> anyhow::Result<Vec<Group>> {
    let known = by_id(set);
    let file = Lines::<2>::read(path, "SOURCE,TARGET")?;
    let mut groups: Vec<Group> = Vec::new();
    let mut places: HashMap<usize, usize> = HashMap::new();
    for (number, [source, target]) in &file.lines {
        let [from, to] = [source, target].map(|name| file.image(*number, name, &known, set));
        let (from, to) = (from?, to?);
        let place = *places.entry(from).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Group { name: source.clone(), sources: vec![from], targets: Vec::new() });
        }
        groups[place].targets.push((to, vec![0]));
    }
    Ok(groups)
}
