//! A source without some of its images.

use std::sync::Arc;

use glob::Pattern;
use image::RgbImage;

use crate::{DataError, GroundTruth, ReadError, Source};

/// The images of a source that are kept, in the source's order and with its classes.
pub struct Subset {
    source: Arc<dyn Source>,
    kept: Vec<usize>,
}

impl Subset {
    /// The source without the images whose name matches one of `patterns`, which have `*`, `?` and `[abc]`: a pattern with
    /// a slash is matched with the path below the root (`*` then also stands for slashes), one without with the file name.
    ///
    /// # Errors
    /// [`DataError`] when a pattern cannot be read, matches no image, or when no image is kept.
    pub fn excluding(source: Arc<dyn Source>, patterns: &[String]) -> Result<Self, DataError> {
        let ids: Vec<String> = (0..source.len()).map(|index| source.id(index)).collect();
        let mut excluded = vec![false; ids.len()];
        for text in patterns {
            let pattern = Pattern::new(text)
                .map_err(|error| DataError::Pattern { pattern: text.clone(), reason: error.msg.to_owned() })?;
            let mut matched = 0;
            for (id, excluded) in ids.iter().zip(&mut excluded) {
                let name = if text.contains('/') { id } else { id.rsplit('/').next().unwrap_or(id) };
                if pattern.matches(name) {
                    *excluded = true;
                    matched += 1;
                }
            }
            if matched == 0 {
                let reason = format!("none of the {} images has such a name; the first is `{}`", ids.len(), ids[0]);
                return Err(DataError::Pattern { pattern: text.clone(), reason });
            }
        }
        let kept: Vec<usize> = (0..ids.len()).filter(|&index| !excluded[index]).collect();
        if kept.is_empty() {
            let pattern = patterns.join(", ");
            return Err(DataError::Pattern { pattern, reason: format!("all {} images have such a name", ids.len()) });
        }
        Ok(Self { source, kept })
    }
}

impl Source for Subset {
    fn len(&self) -> usize {
        self.kept.len()
    }

    fn id(&self, index: usize) -> String {
        self.source.id(self.kept[index])
    }

    fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
        self.source.read(self.kept[index])
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.source.label(self.kept[index])
    }

    fn classes(&self) -> &[String] {
        self.source.classes()
    }

    fn ground_truth(&self, index: usize) -> Option<GroundTruth> {
        self.source.ground_truth(self.kept[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(Vec<&'static str>, Vec<String>);

    impl Source for Named {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn id(&self, index: usize) -> String {
            self.0[index].to_owned()
        }
        fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
            Ok(RgbImage::new(index as u32 + 1, 1))
        }
        fn label(&self, index: usize) -> Option<u32> {
            Some(u32::from(self.0[index].starts_with('b')))
        }
        fn classes(&self) -> &[String] {
            &self.1
        }
    }

    fn without(patterns: &[&str]) -> Result<Subset, DataError> {
        let names = vec!["a/1-mask.png", "a/1.jpg", "a/x/2.jpg", "b/1-mask.png", "b/1.jpg"];
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        Subset::excluding(Arc::new(Named(names, vec!["a".into(), "b".into()])), &patterns)
    }

    #[test]
    fn names_and_paths_are_matched_and_the_rest_keeps_label_and_image() {
        let ids = |patterns: &[&str]| {
            let subset = without(patterns).unwrap();
            (0..subset.len()).map(|index| subset.id(index)).collect::<Vec<_>>()
        };
        assert_eq!(ids(&["*-mask.png"]), ["a/1.jpg", "a/x/2.jpg", "b/1.jpg"]);
        assert_eq!(ids(&["a/*"]), ["b/1-mask.png", "b/1.jpg"]);
        assert_eq!(ids(&["*-mask.png", "*/x/*"]), ["a/1.jpg", "b/1.jpg"]);
        let subset = without(&["*-mask.png"]).unwrap();
        assert_eq!((subset.label(2), subset.classes().len()), (Some(1), 2));
        assert_eq!(subset.read(2).unwrap().width(), 5);
    }

    #[test]
    fn patterns_that_cannot_be_read_or_match_nothing_or_everything_are_refused() {
        for (pattern, reason) in
            [("[a", "data: pattern `[a`: "), ("*.tif", "none of the 5 images"), ("*", "all 5 images")]
        {
            let error = without(&[pattern]).err().unwrap();
            assert!(error.is_usage() && error.to_string().contains(reason), "{error}");
        }
    }
}
