//! `--device`: the name of a device to the device.

use anyhow::bail;
use burn::tensor::Device;

use crate::Usage;

/// Backends besides the CPU, which are features of the build.
const OTHERS: [&str; 4] = ["cuda", "vulkan", "wgpu", "metal"];

/// Backends that this build lacks, by the name that asks for them.
fn missing(name: &str) -> anyhow::Error {
    Usage(anyhow::anyhow!(
        "this build has no `{name}` backend\n\nhint: build with `cargo build --release --features {name}`, or use `--device cpu`"
    ))
    .into()
}

/// The device called `text`: `cpu`, or `cuda`, `vulkan`, `wgpu`, `metal` with an optional `:number`.
pub(crate) fn parse(text: &str) -> anyhow::Result<Device> {
    let (kind, index) = match text.split_once(':') {
        None => (text, 0),
        Some((kind, number)) => match number.parse::<usize>() {
            Ok(number) => (kind, number),
            Err(_) => bail!(Usage(anyhow::anyhow!("device `{text}`: `{number}` is not the number of a device"))),
        },
    };
    match kind {
        "cpu" if text == "cpu" => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(index)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(gpu(index))),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(gpu(index))),
        #[cfg(feature = "metal")]
        "metal" => Ok(Device::metal(gpu(index))),
        _ if OTHERS.contains(&kind) => {
            let _ = index;
            Err(missing(kind))
        }
        _ => {
            bail!(Usage(anyhow::anyhow!(
                "unknown device `{text}`\n\nhint: use `cpu`, `cuda:0`, `vulkan:0`, `wgpu:0` or `metal`"
            )))
        }
    }
}

#[cfg(any(feature = "vulkan", feature = "wgpu", feature = "metal"))]
fn gpu(index: usize) -> burn::tensor::DeviceKind {
    use burn::tensor::DeviceKind;
    if index == 0 { DeviceKind::DefaultDevice } else { DeviceKind::DiscreteGpu(index) }
}
