//! Sets of images, and pairs of them that a classifier is made from and scored on.

use std::sync::Arc;

use dinoxide_data::{DecodeLimits, Source, Subset, open};
use dinoxide_evaluation::{Extracted, Features, LabeledFeatures};

use super::frozen::Frozen;
use crate::Usage;

/// A set of images that was listed.
pub(crate) struct Set {
    /// As the user gave it, with what is left out.
    pub(crate) name: String,
    pub(crate) source: Arc<dyn Source>,
}

impl Set {
    /// Lists the images of a folder, or of the built-in images, without those that patterns exclude.
    pub(crate) fn open(spec: &str, exclude: &[String]) -> anyhow::Result<Self> {
        let source = open(spec, &DecodeLimits::default())?;
        if exclude.is_empty() {
            return Ok(Self { name: spec.to_owned(), source });
        }
        let source: Arc<dyn Source> = Arc::new(Subset::excluding(source, exclude)?);
        Ok(Self { name: format!("{spec} without {}", exclude.join(", ")), source })
    }

    /// Refuses images without classes.
    pub(crate) fn labelled(self) -> anyhow::Result<Self> {
        if self.source.classes().is_empty() {
            return Err(Usage(anyhow::anyhow!(
                "{}: the images have no classes\n\nhint: put each class into a folder of its own, `{}/<class>/<image>`, at least two of them and no image beside them",
                self.name, self.name
            ))
            .into());
        }
        Ok(self)
    }
}

/// The sets of a classifier.
#[derive(clap::Args)]
pub(crate) struct Sets {
    /// Images of known classes: a folder per class, or `synthetic`
    #[arg(long, value_name = "DIR")]
    pub(crate) train: String,
    /// Images to classify, of the same classes
    #[arg(long, value_name = "DIR")]
    pub(crate) val: String,
}

/// Images that a classifier is made from, and images that it is scored on. Classes are numbered as in train; val may lack
/// some of them.
pub(crate) struct Pair {
    pub(crate) train: Set,
    pub(crate) val: Set,
}

impl Pair {
    pub(crate) fn open(sets: &Sets) -> anyhow::Result<Self> {
        let (train, val) = (Set::open(&sets.train, &[])?.labelled()?, Set::open(&sets.val, &[])?.labelled()?);
        let classes = train.source.classes();
        let unknown: Vec<&str> =
            val.source.classes().iter().filter(|class| !classes.contains(class)).map(String::as_str).collect();
        if !unknown.is_empty() {
            return Err(Usage(anyhow::anyhow!(
                "{}: {} of its {} classes are not in {}: {}\n\nhint: leave them out of val, or add images of them to train",
                val.name,
                unknown.len(),
                val.source.classes().len(),
                train.name,
                unknown[..unknown.len().min(5)].join(", ")
            ))
            .into());
        }
        Ok(Self { train, val })
    }

    /// Number of classes of train.
    pub(crate) fn classes(&self) -> usize {
        self.train.source.classes().len()
    }

    /// What `input` takes from the features of both, with labels.
    pub(crate) fn labeled(
        &self,
        frozen: &mut Frozen,
        input: impl Fn(&Extracted) -> anyhow::Result<Features>,
    ) -> anyhow::Result<(LabeledFeatures, LabeledFeatures)> {
        let mut labeled = |set: &Set| -> anyhow::Result<LabeledFeatures> {
            let found = frozen.features(set)?;
            Ok(LabeledFeatures::new(input(&found)?, self.labels(set, &found.indices), self.classes())?)
        };
        Ok((labeled(&self.train)?, labeled(&self.val)?))
    }

    /// The classes of images of either set.
    pub(crate) fn labels(&self, set: &Set, indices: &[usize]) -> Vec<u32> {
        let classes = self.train.source.classes();
        let number = |class: &String| classes.iter().position(|known| known == class).expect("a class of train");
        let numbers: Vec<u32> = set.source.classes().iter().map(|class| number(class) as u32).collect();
        indices.iter().map(|&index| numbers[set.source.label(index).expect("a labelled set") as usize]).collect()
    }
}
