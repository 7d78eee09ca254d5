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
        "cuda" => usable(text, Device::cuda(index)),
        #[cfg(feature = "vulkan")]
        "vulkan" => usable(text, Device::vulkan(gpu(index))),
        #[cfg(feature = "wgpu")]
        "wgpu" => usable(text, Device::wgpu(gpu(index))),
        #[cfg(feature = "metal")]
        "metal" => usable(text, Device::metal(gpu(index))),
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

/// The device, if it computes. A backend looks for its driver and its device at their first use, on a thread of its own, and
/// panics where they are not there.
#[cfg(any(feature = "cuda", feature = "vulkan", feature = "wgpu", feature = "metal", test))]
fn usable(text: &str, device: Device) -> anyhow::Result<Device> {
    let computes = || burn::tensor::Tensor::<1>::ones([3], &device).sum().into_data();
    match said_by_panic(computes) {
        None => Ok(device),
        Some(said) => bail!(
            "device `{text}` cannot be used: {}\n\nhint: see that its driver is installed and shows the device (`nvidia-smi`, \
             `vulkaninfo`), or use `--device cpu`",
            said.lines().next().unwrap_or("its driver does not say why")
        ),
    }
}

/// What the first panic on any thread says while `work` runs, if there is one, instead of printing it.
#[cfg(any(feature = "cuda", feature = "vulkan", feature = "wgpu", feature = "metal", test))]
fn said_by_panic<R>(work: impl FnOnce() -> R) -> Option<String> {
    use std::panic;
    use std::sync::{Arc, Mutex, PoisonError};

    let first = Arc::new(Mutex::new(None::<String>));
    let before = panic::take_hook();
    panic::set_hook(Box::new({
        let first = Arc::clone(&first);
        move |info| {
            let said = info.payload_as_str().unwrap_or_default().to_owned();
            first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(said);
        }
    }));
    let failed = panic::catch_unwind(panic::AssertUnwindSafe(work)).is_err();
    panic::set_hook(before);
    let said = first.lock().unwrap_or_else(PoisonError::into_inner).take();
    said.filter(|_| failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test: the hook that they set is that of the whole program.
    #[test]
    fn a_device_that_panics_is_refused_with_what_its_thread_said() {
        let on_another_thread =
            || std::thread::spawn(|| panic!("no driver: {}", 3)).join().expect("the device's thread");
        assert_eq!(said_by_panic(on_another_thread).as_deref(), Some("no driver: 3"));
        assert_eq!(said_by_panic(|| 3), None);
        usable("cpu", Device::flex()).expect("the CPU computes");
    }
}
