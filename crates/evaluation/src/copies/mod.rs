//! Copy detection: the original of an edited copy found among many images.
//!
//! Each copy is a query; the gallery holds originals and distractors, ranked by cosine of their descriptors
//! ([`descriptor`]). Two scores: mAP, the mean over queries of the average precision of the query's own ranking, as on
//! Copydays (DINO, Caron et al. 2021, §4.2.2), which with one original each is the mean of one over its rank; and micro-AP,
//! the average precision of one ranking of all pairs of query and gallery image (DISC21, Douze et al. 2021, §3), which asks
//! for similarities that mean the same from query to query, as a threshold does. Pairs of equal similarity share a place in
//! the latter: precision at a similarity `s` is that of all pairs with at least `s`.

pub mod descriptor;
pub mod edits;

use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::bootstrap::{Interval, mean_intervals};
use crate::neighbors::similarity_rows;
use crate::protocol::{FeatureSource, Method, Protocol, Report};
use crate::retrieval::{Relevance, average_precision, relevant_ranks};
use crate::{EvaluationError, Features};

/// How copies and descriptors were made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CopiesConfig {
    /// Where the copies are from: a folder, or the edits and their seed.
    pub copies: String,
    /// The exponent of the generalised mean of patch tokens.
    pub gem_exponent: f32,
    /// What whitening was learned from, and how many coordinates were left.
    pub whitening: Option<(String, usize)>,
}

/// Copies to find the originals of.
#[derive(Clone, Debug)]
pub struct Copies {
    /// Their descriptors.
    pub features: Features,
    /// The gallery row of each one's original; none for images that are no copies.
    pub originals: Vec<Option<usize>>,
    /// The kind of each: an index into `kinds`.
    pub kind: Vec<usize>,
    /// Names of the kinds of copies.
    pub kinds: Vec<String>,
}

/// Scores of the copies of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KindScores {
    /// The kind.
    pub kind: String,
    /// Mean average precision, in percent.
    pub map: f64,
    /// Of the mean average precision.
    pub interval: Interval,
    /// Copies of this kind.
    pub queries: usize,
}

/// Result of [`copies`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyScores {
    /// Mean average precision over copies, in percent.
    pub map: f64,
    /// Of the mean average precision.
    pub interval: Interval,
    /// Average precision over all pairs, in percent.
    pub micro_ap: f64,
    /// Share of copies whose original ranks first, in percent.
    pub first: f64,
    /// Of that share.
    pub first_interval: Interval,
    /// Each kind of copies, if there are several.
    pub by_kind: Vec<KindScores>,
    /// Copies that were scored.
    pub queries: usize,
    /// Queries that are no copies, which count for micro-AP only.
    pub without_original: usize,
    /// Images that were searched.
    pub gallery: usize,
}

/// Ranks the gallery for every copy.
///
/// # Errors
/// If the widths differ, or no query is a copy.
///
/// # Panics
/// If the lists of `copies` differ in length, or name what is not there.
pub fn copies(
    gallery: &Features,
    copies: &Copies,
    source: &FeatureSource,
    config: &CopiesConfig,
    device: &Device,
) -> Result<Report<CopyScores>, EvaluationError> {
    let Copies { features, originals, kind, kinds } = copies;
    assert_eq!(
        (originals.len(), kind.len()),
        (features.rows(), features.rows()),
        "one original and kind for each copy"
    );
    // Average precision of each copy, and the similarity of its original.
    let ranked = similarity_rows(gallery, features, device, |query, similarities| {
        originals[query].map(|original| {
            let is = |row| if row == original { Relevance::Relevant } else { Relevance::Other };
            (relevant_ranks(similarities, is), similarities[original])
        })
    })?;
    let scored: Vec<usize> = (0..features.rows()).filter(|&query| originals[query].is_some()).collect();
    if scored.is_empty() {
        return Err(EvaluationError::NothingRelevant { queries: features.rows(), gallery: gallery.rows() });
    }
    let values: Vec<f32> = ranked
        .iter()
        .flatten()
        .flat_map(|(ranks, _)| [100.0 * average_precision(ranks) as f32, if ranks[0] == 0 { 100.0 } else { 0.0 }])
        .collect();
    let positives = ranked.iter().flatten().map(|(_, similarity)| *similarity).collect();
    let micro_ap = 100.0 * micro_average_precision(positives, gallery, features, originals, device)?;
    let intervals = mean_intervals(&values, 2);
    let mean = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
    let every_other = |from: usize| -> Vec<f32> { values.iter().copied().skip(from).step_by(2).collect() };
    let (precisions, firsts) = (every_other(0), every_other(1));
    let by_kind = kinds.iter().enumerate().filter(|_| kinds.len() > 1).filter_map(|(number, name)| {
        let own = scored.iter().zip(&precisions).filter(|(query, _)| kind[**query] == number);
        let own: Vec<f32> = own.map(|(_, &precision)| precision).collect();
        let interval = *mean_intervals(&own, 1).first()?;
        Some(KindScores { kind: name.clone(), map: mean(&own), interval, queries: own.len() })
    });
    let scores = CopyScores {
        map: mean(&precisions),
        interval: intervals[0],
        micro_ap,
        first: mean(&firsts),
        first_interval: intervals[1],
        by_kind: by_kind.collect(),
        queries: scored.len(),
        without_original: features.rows() - scored.len(),
        gallery: gallery.rows(),
    };
    let method = Method::Copies(config.clone());
    let protocol = Protocol::new(method, vec![source.clone()], Some(gallery.rows()), features.rows(), None);
    Ok(Report { protocol, scores })
}

/// Average precision of the ranking of all pairs, from the similarities of the true ones. The others are counted, not kept:
/// each lies between two of the true ones.
fn micro_average_precision(
    mut positives: Vec<f32>,
    gallery: &Features,
    queries: &Features,
    originals: &[Option<usize>],
    device: &Device,
) -> Result<f64, EvaluationError> {
    positives.sort_unstable_by(|a, b| b.total_cmp(a));
    let lowest = *positives.last().expect("a copy");
    // Others that are at least as similar as the positive of this number, and less than the one before it.
    let others: Vec<AtomicU64> = positives.iter().map(|_| AtomicU64::new(0)).collect();
    similarity_rows(gallery, queries, device, |query, similarities| {
        for (row, &similarity) in similarities.iter().enumerate() {
            if similarity >= lowest && originals[query] != Some(row) {
                let place = positives.partition_point(|&positive| positive > similarity);
                others[place].fetch_add(1, Ordering::Relaxed);
            }
        }
    })?;
    let (mut ahead, mut sum) = (0, 0.0);
    for (place, others) in others.into_iter().enumerate() {
        ahead += others.into_inner();
        let found = positives.partition_point(|&positive| positive >= positives[place]);
        sum += found as f64 / (found as u64 + ahead) as f64;
    }
    Ok(sum / positives.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::test_source;
    use crate::test_data::gaussian;

    /// Copies that are their originals and noise, more of it from kind to kind; every fifth query is no copy.
    fn case(gallery: usize, queries: usize, noise: f32, seed: u64) -> (Features, Copies) {
        let (found, dim) = (gaussian(gallery, 6, seed), 6);
        let of_queries = gaussian(queries, dim, seed + 100);
        let originals: Vec<Option<usize>> =
            (0..queries).map(|query| (query % 5 != 4).then_some((3 * query + 1) % gallery)).collect();
        let kind: Vec<usize> = (0..queries).map(|query| query % 2).collect();
        let values = (0..queries).flat_map(|query| {
            let own = originals[query].map_or(vec![0.0; dim], |row| found.row(row).to_vec());
            let scale = noise * (1 + kind[query]) as f32;
            own.into_iter().zip(of_queries.row(query)).map(move |(a, b)| a + scale * b).collect::<Vec<_>>()
        });
        let features = Features::new(queries, dim, values.collect()).unwrap();
        let kinds = vec!["weak".to_owned(), "strong".to_owned()];
        (found, Copies { features, originals, kind, kinds })
    }

    fn cosine(a: &[f32], b: &[f32]) -> f64 {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    }

    /// mAP and the share of first places from each query's sorted list, and micro-AP from one sorted list of all pairs, in
    /// percent.
    fn naive(gallery: &Features, copies: &Copies, kind: Option<usize>) -> (f64, f64, f64) {
        let (mut all, mut precisions) = (Vec::new(), Vec::new());
        for query in 0..copies.features.rows() {
            let mut own: Vec<(f64, bool)> = (0..gallery.rows())
                .map(|row| (cosine(gallery.row(row), copies.features.row(query)), copies.originals[query] == Some(row)))
                .collect();
            own.sort_by(|a, b| b.0.total_cmp(&a.0));
            if let Some(rank) = own.iter().position(|(_, is)| *is)
                && kind.is_none_or(|kind| copies.kind[query] == kind)
            {
                precisions.push(100.0 / (rank + 1) as f64);
            }
            all.extend(own);
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let (mut found, mut sum) = (0.0, 0.0);
        for (rank, (_, is)) in all.iter().enumerate() {
            if *is {
                found += 1.0;
                sum += found / (rank + 1) as f64;
            }
        }
        let count = precisions.len() as f64;
        let first = precisions.iter().filter(|precision| **precision == 100.0).count();
        (precisions.iter().sum::<f64>() / count, 100.0 * sum / found, 100.0 * first as f64 / count)
    }

    #[test]
    fn both_precisions_equal_sorting_everything() {
        let mut cases = 0;
        for (rows, queries, noise, seed) in [(40, 23, 0.4, 1), (300, 57, 0.8, 2), (7, 90, 1.5, 3)] {
            let (gallery, asked) = case(rows, queries, noise, seed);
            let report = copies(&gallery, &asked, &test_source(), &CopiesConfig::default(), &Device::flex()).unwrap();
            let scores = report.scores;
            let (map, micro_ap, first) = naive(&gallery, &asked, None);
            assert!((scores.map - map).abs() < 1e-3, "{} {map}", scores.map);
            assert!((scores.micro_ap - micro_ap).abs() < 1e-6, "{} {micro_ap}", scores.micro_ap);
            assert!((scores.first - first).abs() < 1e-3, "{} {first}", scores.first);
            assert!(map < 99.0 && micro_ap < 99.0 && map > 10.0 && (map - micro_ap).abs() > 1.0, "{map} {micro_ap}");
            assert!(scores.interval.low < map && map < scores.interval.high);
            assert_eq!(scores.by_kind.len(), 2);
            for (number, own) in scores.by_kind.iter().enumerate() {
                let expected = naive(&gallery, &asked, Some(number)).0;
                assert!((own.map - expected).abs() < 1e-3, "{} {expected}", own.map);
            }
            let without = asked.originals.iter().filter(|original| original.is_none()).count();
            assert_eq!((scores.queries, scores.without_original), (queries - without, without));
            cases += 1;
        }
        assert_eq!(cases, 3);
    }

    #[test]
    fn by_hand_pairs_of_equal_similarity_share_a_place() {
        // Similarities of the first query 1, 0, 0 and of the second, whose original is the last, 0, 1, 0.
        let gallery = Features::new(3, 3, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]).unwrap();
        let asked = Copies {
            features: Features::new(2, 3, vec![2.0, 0.0, 0.0, 0.0, 3.0, 0.0]).unwrap(),
            originals: vec![Some(0), Some(2)],
            kind: vec![0, 0],
            kinds: vec!["one".to_owned()],
        };
        let report = copies(&gallery, &asked, &test_source(), &CopiesConfig::default(), &Device::flex()).unwrap();
        let scores = report.scores;
        // The second query's original ties with the first image, which is the earlier row: third.
        assert!((scores.map - 100.0 * (1.0 + 1.0 / 3.0) / 2.0).abs() < 1e-4, "{}", scores.map);
        // Two pairs have similarity 1, the true one among them; all six have at least 0.
        assert!((scores.micro_ap - 100.0 * (1.0 / 2.0 + 2.0 / 6.0) / 2.0).abs() < 1e-9, "{}", scores.micro_ap);
        assert_eq!((scores.first, scores.by_kind.len()), (50.0, 0));
        let no_copy = Copies { originals: vec![None, None], ..asked };
        let error = copies(&gallery, &no_copy, &test_source(), &CopiesConfig::default(), &Device::flex()).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("none of the 2 queries"), "{error}");
    }
}
