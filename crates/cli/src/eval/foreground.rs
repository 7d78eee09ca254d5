//! `dinoxide eval foreground`: figure and ground from patch tokens and from attention.

use std::rc::Rc;

use dinoxide_data::MapKind;
use dinoxide_evaluation::dense::HeadConfig;
use dinoxide_evaluation::dense::foreground::{ATTENTION_MASS, foreground, split_by_folder};
use dinoxide_evaluation::{Method, Protocol, Report};

use super::dense::{DenseCommon, DenseSetup, DenseTask, HeadArgs, PairArgs, stages, warn};
use super::given::Given;
use super::outcome::{Metric, Outcome};
use crate::Usage;
use crate::table::table;
use crate::terminal::Log;

#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    common: DenseCommon,
    #[command(flatten)]
    pairs: PairArgs,
    #[command(flatten)]
    head: HeadArgs,
    /// Instead of `--val`: score this share of the folders of `--train`; images of one folder stay together
    #[arg(long, value_name = "SHARE")]
    split_by_folder: Option<f64>,
    /// Id of pixels that are neither trained on nor scored; 0 is ground, every other id is figure
    #[arg(long, value_name = "ID", default_value_t = 65_535)]
    void: u32,
}

impl DenseTask for Task {
    fn run(&self, given: &Rc<Given>) -> anyhow::Result<Outcome> {
        let config = self.head.config("foreground", HeadConfig::default())?;
        let mut setup = DenseSetup::windowed(given, &self.common, config.kind)?;
        let train = self.pairs.open_train(MapKind::Mask, &mut setup.log)?;
        let (train, val) = match (&self.pairs.val, self.split_by_folder) {
            (Some(_), Some(_)) => {
                return Err(
                    Usage(anyhow::anyhow!("`--val` and `--split-by-folder` are two ways to say the same")).into()
                );
            }
            (None, Some(share)) => {
                if !(share > 0.0 && share < 1.0) {
                    return Err(
                        Usage(anyhow::anyhow!("`--split-by-folder` is {share}, must be above 0 and below 1")).into()
                    );
                }
                let Some((train_part, val_part)) = split_by_folder(&train, share, self.head.seed) else {
                    let path = &self.pairs.train;
                    return Err(
                        Usage(anyhow::anyhow!("{path}: all images are in one folder, which cannot be split")).into()
                    );
                };
                (train.select(&train_part), train.select(&val_part))
            }
            _ => (train, self.pairs.open_val(MapKind::Mask, &mut setup.log)?),
        };
        let mut log = Log::new(None)?;
        let encoder = setup.encoder()?;
        let (scores, rejected) = foreground(&encoder, &train, &val, self.void, &config, &mut stages(&mut log))?;
        log.clear();
        warn(&mut log, &rejected);

        let percent = |value: f64| format!("{value:.2} %");
        let mut rows = vec![vec!["linear classifier on patch tokens".to_owned(), percent(scores.linear)]];
        if let Some(attention) = &scores.attention {
            let mass = 100.0 * ATTENTION_MASS;
            let name = format!("attention of CLS, head {}, {mass:.0} % of its mass", attention.head);
            rows.push(vec![name, percent(attention.iou)]);
        }
        rows.push(vec!["first principal component, threshold".to_owned(), percent(scores.component.iou)]);
        rows.push(vec!["everything is figure".to_owned(), percent(scores.everything)]);
        let text = format!(
            "figure/ground: mean IoU of the figure on {} val images; {} train images\n{}",
            scores.images,
            train.len(),
            table(&["", "IoU"], &rows)
        );
        let val_data = match (&self.pairs.val, self.split_by_folder) {
            (None, Some(share)) => format!("{}, {share} of its folders, seed {}", self.pairs.train, self.head.seed),
            (val, _) => val.clone().unwrap_or_default(),
        };
        let source = setup.source(&self.pairs.train, &val_data);
        let (head, inference) = (config.description(), encoder.description());
        let method = Method::Foreground { head, attention_mass: ATTENTION_MASS, ignored: self.void, inference };
        let protocol = Protocol::new(method, vec![source], Some(train.len()), scores.images, Some(2));
        let report = Report { protocol, scores };
        let scores = &report.scores;
        let data = format!("{} val, {} train images", scores.images, train.len());
        let mut outcome = Outcome::new("foreground", data, &report)?;
        let of = |name: &str, value: f64| Metric::percent(name, value, None);
        outcome.metrics = vec![of("IoU, linear", scores.linear)];
        outcome.metrics.extend(scores.attention.as_ref().map(|attention| of("IoU, attention", attention.iou)));
        outcome.metrics.push(of("IoU, first component", scores.component.iou));
        outcome.shown = Some(text);
        Ok(outcome)
    }
}
