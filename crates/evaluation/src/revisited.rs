//! Landmark retrieval on the revisited Oxford and Paris sets (Radenović et al. 2018): three difficulties, with images that
//! are left out of the ranking.
//!
//! Of each query the gallery has easy, hard and junk images, and all others are negative. *Easy*: easy images are relevant,
//! hard ones are junk; *medium*: both are relevant; *hard*: hard ones are relevant, easy ones are junk. Junk does not take a
//! rank. The average precision is the area under the precision–recall curve by the trapezoidal rule, as in the Oxford
//! protocol: with relevant ranks `r_1 < … < r_R` from 0, `Σ_j ((j−1)/r_j + j/(r_j + 1)) / 2R`, the first term being 1 where
//! `r_j = 0`. Precision@k counts only ranks up to the last relevant one.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::{
    bootstrap::{Interval, mean_intervals},
    error::EvaluationError,
    features::Features,
    neighbors::similarity_rows,
    protocol::{FeatureSource, Method, Protocol, Report},
    retrieval::{Relevance, relevant_ranks},
};

/// Ranks at which precision is taken.
const PRECISION_AT: [usize; 3] = [1, 5, 10];

/// The ground truth as the authors give it, in JSON instead of pickle: `imlist`, `qimlist`, `gnd`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct GroundTruth {
    /// Names of the gallery images, without extension.
    pub imlist: Vec<String>,
    /// Names of the queries, without extension.
    pub qimlist: Vec<String>,
    /// What the gallery has of each query.
    pub gnd: Vec<QueryTruth>,
}

/// Gallery images of one query, as indices into [`GroundTruth::imlist`].
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct QueryTruth {
    /// The landmark is clearly seen.
    pub easy: Vec<usize>,
    /// It is seen from afar, from the side, in part.
    pub hard: Vec<usize>,
    /// It can hardly be told whether it is there.
    pub junk: Vec<usize>,
    /// The part of the query image that is the query: left, top, right, bottom, in pixels.
    #[serde(default)]
    pub bbx: Option<[f32; 4]>,
}

/// Scores of one difficulty, in percent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DifficultyScores {
    /// `easy`, `medium` or `hard`.
    pub difficulty: String,
    /// Mean average precision.
    pub map: f64,
    /// Of the mean average precision.
    pub interval: Interval,
    /// Mean precision at 1, 5 and 10.
    pub precision: [f64; 3],
    /// Queries with a relevant image; the others are not scored.
    pub queries: usize,
}

/// Result of [`revisited()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevisitedScores {
    /// Easy, medium, hard; without those of which no query has a relevant image.
    pub by_difficulty: Vec<DifficultyScores>,
}

impl GroundTruth {
    /// Checks that lists and indices fit together.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), EvaluationError> {
        let refuse = |message: String| Err(EvaluationError::GroundTruth { message });
        if self.qimlist.len() != self.gnd.len() || self.gnd.is_empty() {
            return refuse(format!("{} queries in `qimlist`, {} in `gnd`", self.qimlist.len(), self.gnd.len()));
        }
        for (truth, name) in self.gnd.iter().zip(&self.qimlist) {
            let mut kinds = vec![None; self.imlist.len()];
            let lists = [("easy", &truth.easy), ("hard", &truth.hard), ("junk", &truth.junk)];
            for (kind, &image) in lists.iter().flat_map(|(kind, images)| images.iter().map(move |image| (*kind, image)))
            {
                match kinds.get_mut(image) {
                    None => {
                        let gallery = self.imlist.len();
                        return refuse(format!("query `{name}`: {kind} image {image}, `imlist` has {gallery}"));
                    }
                    Some(Some(other)) => {
                        return refuse(format!("query `{name}`: image {image} is both {other} and {kind}"));
                    }
                    Some(place) => *place = Some(kind),
                }
            }
        }
        Ok(())
    }
}

/// Ranks the gallery for every query and scores the three difficulties.
///
/// # Shapes
/// `gallery [imlist, D]`, `queries [qimlist, D]`, in the order of the lists.
///
/// # Errors
/// If the ground truth is not consistent, its lists are not as long as the features, or no query has a relevant image.
pub fn revisited(
    gallery: &Features,
    queries: &Features,
    truth: &GroundTruth,
    source: &FeatureSource,
    device: &Device,
) -> Result<Report<RevisitedScores>, EvaluationError> {
    truth.check()?;
    for (what, rows, names) in
        [("gallery", gallery.rows(), truth.imlist.len()), ("query", queries.rows(), truth.qimlist.len())]
    {
        if rows != names {
            let message = format!("{names} {what} images are named, features of {rows} are given");
            return Err(EvaluationError::GroundTruth { message });
        }
    }
    let ranks = similarity_rows(gallery, queries, device, |query, similarities| {
        DIFFICULTIES.map(|(_, easy, hard)| {
            let QueryTruth { easy: easy_images, hard: hard_images, junk, .. } = &truth.gnd[query];
            let mut kinds = vec![Relevance::Other; similarities.len()];
            for (images, kind) in [(easy_images, easy), (hard_images, hard), (junk, Relevance::Junk)] {
                images.iter().for_each(|&image| kinds[image] = kind);
            }
            relevant_ranks(similarities, |row| kinds[row])
        })
    })?;
    let by_difficulty: Vec<DifficultyScores> = (0..DIFFICULTIES.len())
        .filter_map(|i| {
            let scored: Vec<&Vec<usize>> = ranks.iter().map(|of| &of[i]).filter(|ranks| !ranks.is_empty()).collect();
            summary(DIFFICULTIES[i].0, &scored)
        })
        .collect();
    if by_difficulty.is_empty() {
        return Err(EvaluationError::NothingRelevant { queries: queries.rows(), gallery: gallery.rows() });
    }
    let protocol = Protocol::new(Method::Revisited, vec![source.clone()], Some(gallery.rows()), queries.rows(), None);
    Ok(Report { protocol, scores: RevisitedScores { by_difficulty } })
}

/// Name, and what easy and hard images are.
const DIFFICULTIES: [(&str, Relevance, Relevance); 3] = [
    ("easy", Relevance::Relevant, Relevance::Junk),
    ("medium", Relevance::Relevant, Relevance::Relevant),
    ("hard", Relevance::Junk, Relevance::Relevant),
];

fn summary(difficulty: &str, scored: &[&Vec<usize>]) -> Option<DifficultyScores> {
    let precisions: Vec<f32> = scored.iter().map(|ranks| 100.0 * trapezoidal(ranks) as f32).collect();
    let interval = *mean_intervals(&precisions, 1).first()?;
    let queries = scored.len();
    let mean = |value: &dyn Fn(&[usize]) -> f64| 100.0 * scored.iter().map(|r| value(r)).sum::<f64>() / queries as f64;
    Some(DifficultyScores {
        difficulty: difficulty.to_owned(),
        map: mean(&trapezoidal),
        interval,
        precision: PRECISION_AT.map(|k| mean(&|ranks| precision_at(ranks, k))),
        queries,
    })
}

/// Average precision by the trapezoidal rule; ranks ascend from 0.
fn trapezoidal(ranks: &[usize]) -> f64 {
    let area = ranks.iter().enumerate().map(|(j, &rank)| {
        let before = if rank == 0 { 1.0 } else { j as f64 / rank as f64 };
        (before + (j + 1) as f64 / (rank + 1) as f64) / 2.0
    });
    area.sum::<f64>() / ranks.len() as f64
}

/// Share of relevant images among the first `k`, or among those up to the last relevant one where that is less.
fn precision_at(ranks: &[usize], k: usize) -> f64 {
    let k = k.min(ranks.last().map_or(0, |rank| rank + 1));
    ranks.iter().filter(|&&rank| rank < k).count() as f64 / k as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{protocol::test_source, test_data::gaussian};
    use dinoxide_random::{Purpose, stream};
    use rand::RngExt;

    /// A gallery of points on a circle, most similar to the query at angle 0 first.
    fn circle(count: usize) -> Features {
        let values = (0..count).flat_map(|i| {
            let angle = 3.0 * i as f32 / count as f32;
            [angle.cos(), angle.sin()]
        });
        Features::new(count, 2, values.collect()).unwrap()
    }

    fn truth(gallery: usize, easy: &[usize], hard: &[usize], junk: &[usize]) -> GroundTruth {
        let gnd = vec![QueryTruth { easy: easy.into(), hard: hard.into(), junk: junk.into(), bbx: None }];
        GroundTruth { imlist: vec![String::new(); gallery], qimlist: vec!["q".into()], gnd }
    }

    fn run(gallery: &Features, truth: &GroundTruth) -> Result<Vec<DifficultyScores>, EvaluationError> {
        let query = Features::new(1, 2, vec![1.0, 0.0]).unwrap();
        revisited(gallery, &query, truth, &test_source(), &Device::flex()).map(|report| report.scores.by_difficulty)
    }

    #[test]
    fn the_three_difficulties_by_hand() {
        // Ranking 0 to 9. Easy: ranks of 1 and 4 without 2 (junk) and 3 (hard): 1 and 2.
        let found = run(&circle(10), &truth(10, &[1, 4], &[3], &[2])).unwrap();
        let near = |ours: f64, expected: f64| assert!((ours - 100.0 * expected).abs() < 1e-9, "{ours} {expected}");
        assert_eq!(found.len(), 3);
        near(found[0].map, ((0.0 + 0.5) / 2.0 + (0.5 + 2.0 / 3.0) / 2.0) / 2.0);
        // Precision at 5 looks at three ranks, at the last relevant image.
        near(found[0].precision[0], 0.0);
        near(found[0].precision[1], 2.0 / 3.0);
        // Medium: 1, 3, 4 at ranks 1, 2, 3.
        near(found[1].map, ((0.0 + 0.5) / 2.0 + (0.5 + 2.0 / 3.0) / 2.0 + (2.0 / 3.0 + 0.75) / 2.0) / 3.0);
        // Hard: 3 at rank 1.
        near(found[2].map, 0.25);
        // First at rank 0: the precision before it is 1.
        near(run(&circle(5), &truth(5, &[0], &[], &[])).unwrap()[0].map, 1.0);
    }

    #[test]
    fn equals_removing_junk_from_the_sorted_list_on_random_ground_truth() {
        let (gallery, queries) = (gaussian(40, 5, 1), gaussian(7, 5, 2));
        let mut rng = stream(5, Purpose::Evaluation, 2000, 0);
        let mut kinds: Vec<Vec<u8>> = Vec::new();
        let gnd: Vec<QueryTruth> = (0..7)
            .map(|_| {
                let kind: Vec<u8> = (0..40).map(|_| rng.random_range(0..8)).collect();
                let of = |wanted: u8| (0..40).filter(|&i| kind[i] == wanted).collect();
                let truth = QueryTruth { easy: of(0), hard: of(1), junk: of(2), bbx: None };
                kinds.push(kind);
                truth
            })
            .collect();
        let truth = GroundTruth { imlist: vec![String::new(); 40], qimlist: vec![String::new(); 7], gnd };
        let found = revisited(&gallery, &queries, &truth, &test_source(), &Device::flex()).unwrap().scores;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a * b)).sum::<f64>();
        for (scores, (relevant, junk)) in
            found.by_difficulty.iter().zip([(&[0][..], &[1, 2][..]), (&[0, 1], &[2]), (&[1], &[0, 2])])
        {
            let mut aps = Vec::new();
            for (query, kind) in kinds.iter().enumerate() {
                let cosine = |i: usize| {
                    let row = gallery.row(i);
                    dot(row, queries.row(query)) / dot(row, row).sqrt()
                };
                let mut order: Vec<usize> = (0..40).filter(|&i| !junk.contains(&kind[i])).collect();
                order.sort_by(|&a, &b| cosine(b).total_cmp(&cosine(a)));
                let total = order.iter().filter(|&&i| relevant.contains(&kind[i])).count();
                // The curve's points: recall and precision after each rank, starting from precision 1.
                let (mut hits, mut area, mut before) = (0, 0.0, (0.0, 1.0));
                for (rank, &i) in order.iter().enumerate() {
                    hits += usize::from(relevant.contains(&kind[i]));
                    let point = (hits as f64 / total as f64, hits as f64 / (rank + 1) as f64);
                    area += (point.0 - before.0) * (before.1 + point.1) / 2.0;
                    before = point;
                }
                aps.push(area);
            }
            let expected = 100.0 * aps.iter().sum::<f64>() / 7.0;
            assert!((scores.map - expected).abs() < 1e-4, "{}: {} {expected}", scores.difficulty, scores.map);
            assert_eq!(scores.queries, 7);
        }
        assert_eq!(found.by_difficulty.len(), 3);
    }

    #[test]
    fn ground_truth_that_does_not_fit_is_refused() {
        let gallery = circle(5);
        for (truth, message) in [
            (truth(5, &[1], &[5], &[]), "query `q`: hard image 5, `imlist` has 5"),
            (truth(5, &[1], &[1], &[]), "query `q`: image 1 is both easy and hard"),
            (truth(6, &[1], &[], &[]), "6 gallery images are named, features of 5 are given"),
        ] {
            let error = run(&gallery, &truth).unwrap_err().to_string();
            assert!(error.starts_with(&format!("ground truth: {message}")), "{error}");
        }
        let none = run(&gallery, &truth(5, &[], &[], &[2])).unwrap_err();
        assert_eq!(none, EvaluationError::NothingRelevant { queries: 1, gallery: 5 });
        let json = r#"{"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": [0], "hard": [], "junk": [], "bbx": [1, 2, 3.5, 4]}]}"#;
        let read: GroundTruth = serde_json::from_str(json).unwrap();
        assert_eq!(read.gnd[0].bbx, Some([1.0, 2.0, 3.5, 4.0]));
        read.check().unwrap();
    }
}
