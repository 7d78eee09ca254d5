//! A ConvNeXt in operators: what [`ConvNext::forward`] computes.
//!
//! As there, feature maps are channels last, which norms and linear layers need. ONNX's convolutions take channels first and
//! give them, so one stands between two transpositions.

use dinoxide_model::ConvNext;

use crate::graph::{Value, int, ints};
use crate::network::{Features, Gelu, Network};
use crate::proto::Attribute;

impl Network<'_, ConvNext> {
    /// What the backbone gives for images `[B, C, H, W]`.
    pub(crate) fn features(mut self, images: &Value) -> Features {
        let gelu = Gelu::new(self.g);
        let stem = self.patches(images, "downsample_layers.0.0");
        let mut x = self.norm("downsample_layers.0", &stem, "downsample_layers.0.1");
        for (stage, depth) in self.backbone.config().depths.into_iter().enumerate() {
            if stage > 0 {
                x = self.downsample(&x, &format!("downsample_layers.{stage}"));
            }
            for block in 0..depth {
                x = self.block(&x, &format!("stages.{stage}.{block}"), &gelu);
            }
        }
        self.tokens(&x)
    }

    /// `[B, h, w, C]` → `[B, h/2, w/2, D]`.
    fn downsample(&mut self, x: &Value, name: &str) -> Value {
        let normed = self.norm(&format!("{name}.0.out"), x, &format!("{name}.0"));
        let first = self.channels_first(&normed, &format!("{name}.channels_first"));
        self.patches(&first, &format!("{name}.1"))
    }

    /// `[B, h, w, D]` → `[B, h, w, D]`.
    fn block(&mut self, x: &Value, name: &str, gelu: &Gelu) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let first = self.channels_first(x, &of("channels_first"));
        let mixed = self.depthwise(&first, &of("dwconv"));
        let normed = self.norm(&of("norm.out"), &mixed, &of("norm"));
        let hidden = self.linear(&normed, &of("pwconv1"));
        let hidden = self.gelu(&hidden, &of("gelu"), gelu);
        let branch = self.linear(&hidden, &of("pwconv2"));
        self.residual(x, &branch, name)
    }

    /// The mean of the last feature map and its places, after one norm.
    fn tokens(&mut self, x: &Value) -> Features {
        let shape = self.g.ints("tokens.shape", &[0, -1, self.backbone.config().dims[3] as i64]);
        let places = self.g.op("tokens", "Reshape", &[x, &shape], vec![]);
        let over_places = vec![ints("axes", &[1]), int("keepdims", 0)];
        let mean = self.g.op("tokens.mean", "ReduceMean", &[&places], over_places);
        let (weight, bias) = (self.constant("norm.weight"), self.constant("norm.bias"));
        let cls = self.layer_norm("cls", &mean, &weight, &bias);
        Features { cls, patches: self.layer_norm("patches", &places, &weight, &bias), registers: None }
    }

    /// A convolution whose stride is its kernel: `[B, C, h, w]` → `[B, h/k, w/k, D]`, rounded down.
    fn patches(&mut self, x: &Value, name: &str) -> Value {
        let [_, _, side, _] = self.kernel(name);
        self.convolution(x, name, vec![ints("kernel_shape", &[side; 2]), ints("strides", &[side; 2])])
    }

    /// A convolution of each channel by itself, with zeros around the map: `[B, D, h, w]` → `[B, h, w, D]`.
    fn depthwise(&mut self, x: &Value, name: &str) -> Value {
        let [dim, _, side, _] = self.kernel(name);
        let pads = ints("pads", &[side / 2; 4]);
        self.convolution(x, name, vec![ints("kernel_shape", &[side; 2]), int("group", dim as i64), pads])
    }

    /// The shape of a convolution's weight.
    fn kernel(&self, name: &str) -> [usize; 4] {
        let shape = &self.weights[&format!("{name}.weight")].shape;
        shape.as_slice().try_into().expect("a convolution's weight has four axes")
    }

    fn convolution(&mut self, x: &Value, name: &str, attributes: Vec<Attribute>) -> Value {
        let weight = self.constant(&format!("{name}.weight"));
        let bias = self.constant(&format!("{name}.bias"));
        let map = self.g.op(&format!("{name}.map"), "Conv", &[x, &weight, &bias], attributes);
        self.g.op(name, "Transpose", &[&map], vec![ints("perm", &[0, 2, 3, 1])])
    }

    /// `[B, h, w, D]` → `[B, D, h, w]`.
    fn channels_first(&mut self, x: &Value, name: &str) -> Value {
        self.g.op(name, "Transpose", &[x], vec![ints("perm", &[0, 3, 1, 2])])
    }
}
