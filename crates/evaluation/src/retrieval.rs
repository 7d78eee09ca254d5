//! Image retrieval: the images of a gallery ranked by cosine similarity to each query.
//!
//! For a query with `R` relevant images at ranks `r_1 < … < r_R` (from 1), the average precision is `Σ_j (j / r_j) / R`,
//! and mAP its mean over the queries. Recall@k is the share of queries with a relevant image among the first `k`, as in
//! metric learning (Jégou et al. 2011, §6). Of equally similar images the earlier row ranks first.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::{
    bootstrap::{Interval, mean_intervals},
    error::EvaluationError,
    labels::LabeledFeatures,
    neighbors::similarity_rows,
    protocol::{FeatureSource, Method, Protocol, Report},
    top_k::key,
};

/// Settings of [`retrieval()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrievalConfig {
    /// Ranks at which recall is taken.
    pub k: Vec<usize>,
    /// What makes an image relevant to another, in words: `same class`, `same first 2 folders`.
    pub relevance: String,
}

impl Default for RetrievalConfig {
    fn default() -> Self {
        Self { k: vec![1, 5, 10], relevance: "same class".into() }
    }
}

/// Recall at a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecallAt {
    /// The rank.
    pub k: usize,
    /// Share of queries with a relevant image at this rank or before, in percent.
    pub recall: f64,
    /// Of the recall.
    pub interval: Interval,
}

/// Result of [`retrieval()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetrievalScores {
    /// Mean average precision, in percent.
    pub map: f64,
    /// Of the mean average precision.
    pub interval: Interval,
    /// Recall at each rank of the settings.
    pub recall: Vec<RecallAt>,
    /// Queries that were scored.
    pub queries: usize,
    /// Queries without a relevant image, which are not scored.
    pub without_match: usize,
}

/// What a gallery image is to a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relevance {
    Relevant,
    Other,
    /// Left out of the ranking: the query itself, or an image of which it is undecided.
    Junk,
}

/// Ranks the gallery for every query; the images with the query's label are relevant. Without queries, every gallery image
/// is a query in turn and is left out of its own ranking.
///
/// # Errors
/// If a rank is 0 or beyond the gallery, the widths differ, or no query has a relevant image.
pub fn retrieval(
    gallery: &LabeledFeatures,
    queries: Option<&LabeledFeatures>,
    source: &FeatureSource,
    config: &RetrievalConfig,
    device: &Device,
) -> Result<Report<RetrievalScores>, EvaluationError> {
    config.validate(gallery.rows() - usize::from(queries.is_none()))?;
    let asked = queries.unwrap_or(gallery);
    let ranks = similarity_rows(gallery.features(), asked.features(), device, |query, similarities| {
        relevant_ranks(similarities, |row| match gallery.labels()[row] == asked.labels()[query] {
            _ if queries.is_none() && row == query => Relevance::Junk,
            true => Relevance::Relevant,
            false => Relevance::Other,
        })
    })?;
    let scored: Vec<&Vec<usize>> = ranks.iter().filter(|ranks| !ranks.is_empty()).collect();
    if scored.is_empty() {
        return Err(EvaluationError::NothingRelevant { queries: asked.rows(), gallery: gallery.rows() });
    }
    let columns = 1 + config.k.len();
    let values: Vec<f32> = scored
        .iter()
        .flat_map(|ranks| {
            let found = config.k.iter().map(|&k| if ranks[0] < k { 100.0 } else { 0.0 });
            [100.0 * average_precision(ranks) as f32].into_iter().chain(found)
        })
        .collect();
    let intervals = mean_intervals(&values, columns);
    let mean = |column: usize| {
        values.iter().skip(column).step_by(columns).map(|&value| f64::from(value)).sum::<f64>() / scored.len() as f64
    };
    let recall = config.k.iter().enumerate();
    let recall = recall.map(|(i, &k)| RecallAt { k, recall: mean(1 + i), interval: intervals[1 + i] }).collect();
    let scores = RetrievalScores {
        map: mean(0),
        interval: intervals[0],
        recall,
        queries: scored.len(),
        without_match: ranks.len() - scored.len(),
    };
    let method = Method::Retrieval(config.clone());
    let searched = queries.map(|_| gallery.rows());
    let protocol = Protocol::new(method, vec![source.clone()], searched, asked.rows(), Some(gallery.num_classes()));
    Ok(Report { protocol, scores })
}

impl RetrievalConfig {
    /// Checks the settings for rankings of `ranked` images, before any feature is extracted.
    ///
    /// # Errors
    /// No rank, or one that is 0 or beyond the ranking.
    pub fn validate(&self, ranked: usize) -> Result<(), EvaluationError> {
        if self.k.is_empty() || self.k.iter().any(|&k| k == 0 || k > ranked) {
            let expected = "a list of numbers from 1 to the number of images that are ranked";
            return Err(EvaluationError::Setting {
                task: "retrieval",
                key: "k",
                value: format!("{:?} with {ranked} images to rank", self.k),
                expected,
            });
        }
        Ok(())
    }
}

/// Ranks, from 0 and ascending, of the relevant images in the ranking without junk.
///
/// Only the relevant images are sorted; of each other one it is found how many of them are ahead.
pub(crate) fn relevant_ranks(similarities: &[f32], relevance: impl Fn(usize) -> Relevance) -> Vec<usize> {
    let mut relevant = Vec::new();
    let mut others = Vec::new();
    for (row, &similarity) in similarities.iter().enumerate() {
        match relevance(row) {
            Relevance::Relevant => relevant.push(key(similarity, row)),
            Relevance::Other => others.push(key(similarity, row)),
            Relevance::Junk => {}
        }
    }
    relevant.sort_unstable_by(|a, b| b.cmp(a));
    let mut with_ahead = vec![0; relevant.len() + 1];
    others.into_iter().for_each(|other| with_ahead[relevant.partition_point(|&one| one > other)] += 1);
    let mut others_ahead = 0;
    (0..relevant.len())
        .map(|j| {
            others_ahead += with_ahead[j];
            j + others_ahead
        })
        .collect()
}

/// Average precision from all relevant ranks, ascending from 0.
pub(crate) fn average_precision(ranks: &[usize]) -> f64 {
    let precisions = ranks.iter().enumerate().map(|(j, &rank)| (j + 1) as f64 / (rank + 1) as f64);
    precisions.sum::<f64>() / ranks.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{features::Features, protocol::test_source, test_data::clustered};

    /// Ranks by sorting everything; precision and recall counted at every rank.
    fn naive(gallery: &LabeledFeatures, query: &[f32], label: u32, itself: Option<usize>) -> (f64, Option<usize>) {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let mut order: Vec<usize> = (0..gallery.rows()).filter(|&row| Some(row) != itself).collect();
        let cosine = |row: usize| {
            let row = gallery.features().row(row);
            dot(row, query) / (dot(row, row) * dot(query, query)).sqrt()
        };
        order.sort_by(|&a, &b| cosine(b).total_cmp(&cosine(a)));
        let (mut found, mut sum, mut first) = (0, 0.0, None);
        for (rank, &row) in order.iter().enumerate() {
            if gallery.labels()[row] == label {
                found += 1;
                sum += f64::from(found) / (rank + 1) as f64;
                first = first.or(Some(rank));
            }
        }
        (sum / f64::from(found), first)
    }

    #[test]
    fn equals_sorting_and_counting_with_and_without_queries() {
        let (gallery, queries) = (clustered(5, 90, 7, 1.2, 1), clustered(5, 31, 7, 1.2, 2));
        let config = RetrievalConfig { k: vec![1, 2, 9], ..Default::default() };
        let mut cases = 0;
        for queries in [Some(&queries), None] {
            let found = retrieval(&gallery, queries, &test_source(), &config, &Device::flex()).unwrap().scores;
            let asked = queries.unwrap_or(&gallery);
            let naive: Vec<(f64, Option<usize>)> = (0..asked.rows())
                .map(|i| naive(&gallery, asked.features().row(i), asked.labels()[i], queries.is_none().then_some(i)))
                .filter(|(_, first)| first.is_some())
                .collect();
            let map = 100.0 * naive.iter().map(|(ap, _)| ap).sum::<f64>() / naive.len() as f64;
            assert!((found.map - map).abs() < 1e-4, "{} {map}", found.map);
            assert!(map > 25.0 && map < 95.0 && found.interval.low < map && map < found.interval.high);
            for at in &found.recall {
                let hits = naive.iter().filter(|(_, first)| first.unwrap() < at.k).count();
                assert!((at.recall - 100.0 * hits as f64 / naive.len() as f64).abs() < 1e-9);
                cases += 1;
            }
            assert_eq!((found.queries, found.without_match), (naive.len(), asked.rows() - naive.len()));
        }
        assert_eq!(cases, 6);
    }

    #[test]
    fn average_precision_equals_scikit_learn() {
        // From benches/peer/evaluation/expected.py.
        let cases: serde_json::Value = serde_json::from_str(include_str!("expected.json")).unwrap();
        let cases = cases["ranking"].as_array().unwrap();
        for case in cases {
            let scores: Vec<f32> = serde_json::from_value(case["scores"].clone()).unwrap();
            let relevant: Vec<u8> = serde_json::from_value(case["relevant"].clone()).unwrap();
            let kind = |row: usize| if relevant[row] == 1 { Relevance::Relevant } else { Relevance::Other };
            let ours = average_precision(&relevant_ranks(&scores, kind));
            assert!((ours - case["average_precision"].as_f64().unwrap()).abs() < 1e-12, "{ours} of {case}");
        }
        assert_eq!(cases.len(), 5);
    }

    #[test]
    fn ranks_skip_junk_and_break_ties_by_row() {
        let similarities = [0.5, 0.9, 0.5, 0.7, 0.5, 0.1];
        let of = |kinds: [Relevance; 6]| relevant_ranks(&similarities, |row| kinds[row]);
        use Relevance::{Junk as J, Other as O, Relevant as R};
        // The order is 1, 3, 0, 2, 4, 5.
        assert_eq!(of([O, O, R, O, R, O]), [3, 4]);
        assert_eq!(of([R, O, O, J, O, R]), [1, 4]);
        assert_eq!(of([O, R, J, J, J, R]), [0, 2]);
        assert!(of([O; 6]).is_empty());
        assert!((average_precision(&[0, 2]) - (1.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
    }

    #[test]
    fn an_image_does_not_find_itself_but_does_find_its_copy() {
        let features = Features::new(4, 2, vec![1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.1, 1.0]).unwrap();
        let gallery = LabeledFeatures::new(features, vec![0, 0, 1, 2], 3).unwrap();
        let config = RetrievalConfig { k: vec![1], ..Default::default() };
        let found = retrieval(&gallery, None, &test_source(), &config, &Device::flex()).unwrap().scores;
        assert_eq!((found.map, found.queries, found.without_match), (100.0, 2, 2));
    }

    #[test]
    fn ranks_beyond_the_gallery_and_labels_without_a_second_image_are_refused() {
        let gallery = clustered(4, 20, 3, 1.0, 1);
        let run = |gallery: &LabeledFeatures, k: Vec<usize>| {
            let config = RetrievalConfig { k, ..Default::default() };
            retrieval(gallery, None, &test_source(), &config, &Device::flex()).unwrap_err()
        };
        for k in [vec![], vec![0], vec![1, 20]] {
            assert!(run(&gallery, k).to_string().starts_with("retrieval: `k` is "));
        }
        let all_different = LabeledFeatures::new(gallery.features().clone(), (0..20).collect(), 20).unwrap();
        assert_eq!(run(&all_different, vec![1]), EvaluationError::NothingRelevant { queries: 20, gallery: 20 });
    }
}
