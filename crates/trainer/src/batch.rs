//! A batch: crops with their masks, on the device.

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, s};
use dinoxide_augmentation::{Crops, Masks, RgbImage, normalize};
use dinoxide_kernels::in_host_memory;

/// What a step trains on.
///
/// Crop axes are outermost: row `v·B + b` of anything stacked over crops is crop `v` of sample `b`.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Names of the samples, for messages.
    pub ids: Vec<String>,
    /// `[2, B, C, H, W]`, normalised, plain.
    pub global: Tensor<5>,
    /// `[L, B, C, h, w]`; `None` without local crops.
    pub local: Option<Tensor<5>>,
    /// `[2, B, C, H', W']`, what the Gram teacher sees of the global crops; `None` when it sees those themselves.
    pub gram: Option<Tensor<5>>,
    /// Masks of the global crops.
    pub masks: Masks,
    /// What a frozen teacher says of the global crops, where that is known beforehand.
    pub tokens: Option<TeacherTokens>,
}

/// A frozen teacher's tokens of the global crops of a batch. Plain.
#[derive(Clone, Debug)]
pub struct TeacherTokens {
    /// `[2, B, D]`.
    pub cls: Tensor<3>,
    /// `[2, B, P, D]`.
    pub patches: Tensor<4>,
}

impl TeacherTokens {
    /// The tokens of the samples `range`.
    fn part(&self, range: std::ops::Range<usize>) -> Self {
        let all = s![.., range];
        Self { cls: self.cls.clone().slice(all), patches: self.patches.clone().slice(all) }
    }

    /// Those of consecutive parts of a batch, together.
    pub(crate) fn join(parts: Vec<Self>) -> Self {
        let (cls, patches) = parts.into_iter().map(|part| (part.cls, part.patches)).unzip();
        Self { cls: Tensor::cat(cls, 1), patches: Tensor::cat(patches, 1) }
    }
}

impl Batch {
    /// Puts the crops of samples on the device, normalised by the mean and standard deviation of each channel.
    ///
    /// # Panics
    /// If the crops of a group differ in size or number: one recipe cut them.
    pub fn new(samples: &[(String, Crops)], masks: Masks, mean: [f32; 3], std: [f32; 3], device: &Device) -> Self {
        let locals = samples[0].1.local.len();
        let global = stack(samples, 2, |crops, v| &crops.global[v], mean, std, device);
        let local = (locals > 0).then(|| stack(samples, locals, |crops, v| &crops.local[v], mean, std, device));
        let gram = samples[0].1.gram.is_some();
        let gram =
            gram.then(|| stack(samples, 2, |crops, v| &crops.gram.as_ref().expect("one recipe")[v], mean, std, device));
        Self { ids: samples.iter().map(|(id, _)| id.clone()).collect(), global, local, gram, masks, tokens: None }
    }

    /// Samples in the batch.
    pub fn len(&self) -> usize {
        self.global.dims()[1]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The batch without all but the first `count` local crops.
    pub fn with_locals(&self, count: usize) -> Self {
        let fewer = |local: Tensor<5>| if local.dims()[0] > count { local.slice(s![..count]) } else { local };
        let local = self.local.clone().filter(|_| count > 0).map(fewer);
        Self { local, ..self.clone() }
    }

    /// The batch in consecutive parts of nearly equal size.
    pub(crate) fn divide(&self, parts: usize) -> Vec<Self> {
        if parts == 1 {
            return vec![self.clone()];
        }
        let len = self.len();
        (0..parts).map(|i| self.part(i * len / parts..(i + 1) * len / parts)).collect()
    }

    /// The samples `range` by themselves, with their masks.
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        let batch = self.len();
        let cut = |crops: &Tensor<5>| {
            let [views, _, c, h, w] = crops.dims();
            crops.clone().slice([0..views, range.clone(), 0..c, 0..h, 0..w])
        };
        let patches = self.masks.patches;
        let crops: Vec<usize> =
            (0..self.masks.crops / batch).flat_map(|view| range.clone().map(move |b| view * batch + b)).collect();
        let mut masks =
            Masks { crops: crops.len(), patches, mask: Vec::new(), indices: Vec::new(), weights: Vec::new() };
        for (new, &old) in crops.iter().enumerate() {
            masks.mask.extend(&self.masks.mask[old * patches..(old + 1) * patches]);
            for (&index, &weight) in self.masks.indices.iter().zip(&self.masks.weights) {
                if index / patches == old {
                    masks.indices.push(new * patches + index % patches);
                    masks.weights.push(weight);
                }
            }
        }
        Self {
            ids: self.ids[range.clone()].to_vec(),
            global: cut(&self.global),
            local: self.local.as_ref().map(cut),
            gram: self.gram.as_ref().map(cut),
            masks,
            tokens: self.tokens.as_ref().map(|tokens| tokens.part(range.clone())),
        }
    }
}

/// `[V, B, 3, H, W]` from one crop per sample and view.
fn stack<'a>(
    samples: &'a [(String, Crops)],
    views: usize,
    crop: impl Fn(&'a Crops, usize) -> &'a RgbImage,
    mean: [f32; 3],
    std: [f32; 3],
    device: &Device,
) -> Tensor<5> {
    let (width, height) = crop(&samples[0].1, 0).dimensions();
    let images =
        (0..views).flat_map(|v| samples.iter().map(move |(_, crops)| (v, crops))).map(|(v, crops)| crop(crops, v));
    let shape = [views, samples.len(), 3, height as usize, width as usize];
    if in_host_memory(device) {
        Tensor::from_data(TensorData::new(normalize(images, (width, height), mean, std), shape), device)
    } else {
        send(images, shape, mean, std, device)
    }
}

/// What [`normalize`] makes of images, from their bytes on the device: a quarter of the numbers' size is sent there.
///
/// Not every device has bytes, so four of them travel as an integer.
fn send<'a>(
    images: impl Iterator<Item = &'a RgbImage>,
    [views, batch, channels, height, width]: [usize; 5],
    mean: [f32; 3],
    std: [f32; 3],
    device: &Device,
) -> Tensor<5> {
    let size = (width as u32, height as u32);
    let mut bytes = Vec::with_capacity((views * batch * channels * height * width).next_multiple_of(4));
    for image in images {
        assert_eq!(image.dimensions(), size, "images of one tensor have one size");
        bytes.extend_from_slice(image.as_raw());
    }
    let count = bytes.len();
    bytes.resize(count.next_multiple_of(4), 0);
    let words: Vec<i32> = bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word)).collect();
    let len = words.len();
    let mut data = TensorData::new(words, [len]);
    // Into memory that the device can fetch from by itself, where it has such.
    device.staging(std::iter::once(&mut data));
    let words = Tensor::<1, Int>::from_data(data, (device, DType::I32));
    let byte = |i: i32| words.clone().bitwise_right_shift_scalar(8 * i).bitwise_and_scalar(255);
    let pixels = Tensor::stack::<2>((0..4).map(byte).collect(), 1).reshape([-1]).slice(s![..count]);
    let of_channel = |values: [f32; 3]| Tensor::<1>::from_data(values, device).reshape([1, 1, channels, 1, 1]);
    let pixels = pixels.reshape([views, batch, height, width, channels]).permute([0, 1, 4, 2, 3]).float();
    (pixels / 255.0 - of_channel(mean)) / of_channel(std)
}

/// Masks on the device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceMasks {
    /// `[crops, P]`.
    pub(crate) mask: Tensor<2, Bool>,
    /// `[M]`.
    pub(crate) weights: Tensor<1>,
}

impl DeviceMasks {
    pub(crate) fn new(masks: &Masks, device: &Device) -> Self {
        Self {
            mask: Tensor::from_data(TensorData::new(masks.mask.clone(), [masks.crops, masks.patches]), device),
            weights: Tensor::from_data(TensorData::from(masks.weights.as_slice()), device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_sent_become_the_numbers_that_the_host_makes() {
        let mut cases = 0;
        // Sizes whose bytes are a multiple of four, and that leave one, two and three over.
        for (views, batch, height, width) in [(2, 2, 5, 4), (1, 3, 3, 5), (2, 1, 3, 7), (1, 1, 3, 1)] {
            let image = |i: usize| {
                RgbImage::from_fn(width, height, |x, y| {
                    let v = 7 * i as u32 + 31 * x + 83 * y;
                    [v as u8, (v * 5 + 3) as u8, 255 - v as u8].into()
                })
            };
            let images: Vec<_> = (0..views * batch).map(image).collect();
            let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
            let shape = [views, batch, 3, height as usize, width as usize];
            let sent = send(images.iter(), shape, mean, std, &Device::flex());
            assert_eq!(sent.dims(), shape);
            let sent = sent.into_data().try_into_vec::<f32>().expect("f32");
            let made = normalize(images.iter(), (width, height), mean, std);
            assert_eq!(sent.len(), made.len());
            assert!(sent.iter().zip(&made).all(|(a, b)| (a - b).abs() < 1e-6), "{shape:?}: {sent:?} and {made:?}");
            cases += 1;
        }
        assert_eq!(cases, 4);
    }
}
