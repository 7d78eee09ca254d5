//! Seconds of a run without those spent elsewhere, and resident memory.

use std::time::Instant;

/// Time and memory.
pub(crate) struct Clock {
    /// Seconds of earlier sessions.
    pub(crate) before: f64,
    /// Seconds of this session spent on evaluations, and on other students.
    pub(crate) elsewhere: f64,
    pub(crate) start: Instant,
    pub(crate) window_start: Instant,
    pub(crate) window_images: u64,
    pub(crate) window_waited: f64,
    pub(crate) peak_memory: u64,
}

impl Clock {
    pub(crate) fn seconds(&self) -> f64 {
        self.before + self.start.elapsed().as_secs_f64() - self.elsewhere
    }
}

pub(crate) fn resident_bytes() -> u64 {
    memory_stats::memory_stats().map_or(0, |stats| stats.physical_mem as u64)
}

/// The highest resident memory of this process so far, where the system tells; else that of this moment.
pub(crate) fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    peak.map_or_else(resident_bytes, |kibibytes: u64| 1024 * kibibytes)
}
