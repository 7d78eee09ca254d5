//! `dinoxide eval clustering`.

use dinoxide_evaluation::{KMeansConfig, LabeledFeatures, clustering};

use super::frozen::{Frozen, Tokens};
use super::outcome::{Metric, Outcome};
use super::sets::Set;

#[derive(clap::Args)]
pub(crate) struct Task {
    /// Images of known classes: a folder per class, or `synthetic`
    #[arg(long, value_name = "DIR")]
    data: String,
    #[command(flatten)]
    tokens: Tokens,
    /// Leave out images whose file name matches, or with a slash in it, whose path; may be given several times
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Number of clusters; default: the number of classes
    #[arg(long, value_name = "N")]
    clusters: Option<usize>,
    /// Starts of k-means, of which the one with the lowest inertia counts
    #[arg(long, value_name = "N", default_value_t = 10)]
    restarts: usize,
    /// Most iterations of a start
    #[arg(long, value_name = "N", default_value_t = 300)]
    max_iterations: usize,
    /// Seed of the first centers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl super::measurement::Task for Task {
    const BLOCKS: usize = 1;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        let set = Set::open(&self.data, &self.exclude)?.labelled()?;
        let &Self { clusters, restarts, max_iterations, seed, .. } = self;
        let config = KMeansConfig { clusters, restarts, max_iterations, seed };
        let classes = set.source.classes().len();
        config.validate(set.source.len(), classes)?;
        let tokens = self.tokens.chosen();
        let found = frozen.features(&set)?;
        let data: LabeledFeatures = found.labeled(&found.image_features(&tokens)?, &*set.source)?;
        let source = frozen.source("", &set.name, tokens, 1);
        let report = clustering(&data, &source, &config, &frozen.device)?;
        let scores = &report.scores;
        let shown = format!("{} images of {classes} classes in {} clusters", data.rows(), scores.clusters);
        let mut outcome = Outcome::new("clustering", shown, &report)?;
        outcome.metrics = vec![
            Metric::percent("accuracy, matched", scores.agreement.accuracy, None),
            Metric::plain("NMI", scores.agreement.nmi),
            Metric::plain("ARI", scores.agreement.ari),
        ];
        Ok(outcome)
    }
}
