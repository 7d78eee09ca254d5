//! A parallel map over positions that delivers in order and holds a bounded number of results.
//!
//! Workers claim positions one by one; a ring of `window` slots keeps what is done until its turn comes. A position may be
//! claimed only when it lies less than `window` ahead of the next one to deliver, so a slow item holds the others back
//! rather than letting results pile up. As each result is a function of its position alone, the number of threads changes
//! when things happen, never what is delivered.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Work on one position went wrong, or the loader could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoaderError {
    /// The work panicked; the other positions are not affected.
    #[error("loader: position {position}: worker panicked: {message}")]
    Panicked {
        /// The position that was worked on.
        position: u64,
        /// What the panic said.
        message: String,
    },
    /// Nothing may be in flight.
    #[error("loader: the window is 0, expected at least 1")]
    NoWindow,
    /// The system gave no thread.
    #[error("loader: thread {index} of {threads} cannot be started: {source}\n\nhint: use fewer threads")]
    NoThread {
        /// Which thread, from 1.
        index: usize,
        /// How many were asked for.
        threads: usize,
        /// What the system says.
        source: std::io::Error,
    },
}

type Work<T> = dyn Fn(u64) -> T + Send + Sync;

/// Results of `work` for consecutive positions, in order, worked out ahead on other threads.
pub struct Loader<T> {
    position: u64,
    waited: Duration,
    shared: Arc<Shared<T>>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared<T> {
    work: Box<Work<T>>,
    window: usize,
    state: Mutex<State<T>>,
    /// Told when a position may be claimed, or when to stop.
    room: Condvar,
    /// Told when the next result to deliver is there.
    ready: Condvar,
}

struct State<T> {
    /// The position of the first slot: the next one to deliver.
    first: u64,
    /// One slot for each position that was claimed and not delivered; `None` while it is worked on.
    slots: VecDeque<Option<Result<T, LoaderError>>>,
    stopped: bool,
}

impl<T: Send + 'static> Loader<T> {
    /// Starts working from `start_position` on.
    ///
    /// At most `window` positions are being worked on or wait for delivery at any time; what was delivered is the
    /// caller's and no longer counts. With no threads the work is done
    /// within [`next`](Self::next), and nothing ahead.
    ///
    /// # Errors
    /// [`LoaderError::NoWindow`] and [`LoaderError::NoThread`].
    pub fn new(
        threads: usize,
        window: usize,
        start_position: u64,
        work: impl Fn(u64) -> T + Send + Sync + 'static,
    ) -> Result<Self, LoaderError> {
        if window == 0 {
            return Err(LoaderError::NoWindow);
        }
        let state = State { first: start_position, slots: VecDeque::new(), stopped: false };
        let shared = Arc::new(Shared {
            work: Box::new(work),
            window,
            state: Mutex::new(state),
            room: Condvar::new(),
            ready: Condvar::new(),
        });
        let mut loader = Self { position: start_position, waited: Duration::ZERO, shared, workers: Vec::new() };
        // More threads than slots would only sleep.
        for index in 1..=threads.min(window) {
            let shared = Arc::clone(&loader.shared);
            let worker = std::thread::Builder::new().name(format!("loader-{index}")).spawn(move || shared.serve());
            // On failure the drop of `loader` ends the threads that did start.
            loader.workers.push(worker.map_err(|source| LoaderError::NoThread { index, threads, source })?);
        }
        Ok(loader)
    }

    /// The result for the next position.
    ///
    /// # Errors
    /// [`LoaderError::Panicked`] when the work on this position panicked. The call after that goes on with the position
    /// after it.
    #[expect(clippy::should_implement_trait, reason = "the sequence has no end, and an error does not end it")]
    pub fn next(&mut self) -> Result<T, LoaderError> {
        let since = Instant::now();
        let result = if self.workers.is_empty() { self.shared.run(self.position) } else { self.shared.take() };
        self.waited += since.elapsed();
        self.position += 1;
        result
    }

    /// The position that [`next`](Self::next) will deliver.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How long [`next`](Self::next) has kept its caller, in all. Without threads that is all the work.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl<T> Drop for Loader<T> {
    /// Waits for the items that are being worked on, and starts no others.
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.room.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of the work, and has none of its own to report.
            let _ended = worker.join();
        }
    }
}

impl<T> Shared<T> {
    /// Nothing panics under the lock, so a poisoned one still holds a sound state.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's life.
    fn serve(&self) {
        while let Some(position) = self.claim() {
            let result = self.run(position);
            let mut state = self.lock();
            let slot = (position - state.first) as usize;
            state.slots[slot] = Some(result);
            if slot == 0 {
                self.ready.notify_one();
            }
        }
    }

    /// The next position to work on, or `None` when it is time to stop.
    fn claim(&self) -> Option<u64> {
        let full = |state: &mut State<T>| !state.stopped && state.slots.len() >= self.window;
        let mut state = self.room.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return None;
        }
        state.slots.push_back(None);
        Some(state.first + state.slots.len() as u64 - 1)
    }

    fn take(&self) -> Result<T, LoaderError> {
        let pending = |state: &mut State<T>| !matches!(state.slots.front(), Some(Some(_)));
        let mut state = self.ready.wait_while(self.lock(), pending).unwrap_or_else(PoisonError::into_inner);
        let result = state.slots.pop_front().flatten().expect("waited until the first slot was filled");
        state.first += 1;
        self.room.notify_one();
        result
    }

    fn run(&self, position: u64) -> Result<T, LoaderError> {
        // A panic that ended a worker would leave the consumer waiting for ever.
        catch_unwind(AssertUnwindSafe(|| (self.work)(position))).map_err(|payload| {
            let message = payload
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "without a message".into());
            LoaderError::Panicked { position, message }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Work that takes longer for some positions than for others, so that threads overtake each other.
    fn uneven(position: u64) -> u64 {
        if position % 5 == 1 {
            std::thread::sleep(Duration::from_millis(3));
        }
        position * position
    }

    #[test]
    fn results_come_in_order_whatever_the_number_of_threads() {
        for (threads, window) in [(0, 1), (1, 1), (1, 7), (4, 2), (4, 9), (3, 1)] {
            let mut loader = Loader::new(threads, window, 10, uneven).unwrap();
            let got: Vec<_> = (0..60).map(|_| loader.next().unwrap()).collect();
            assert_eq!(got, (10..70).map(|p| p * p).collect::<Vec<u64>>(), "{threads} threads, window {window}");
            assert_eq!(loader.position(), 70);
        }
    }

    /// Counts how many of itself exist.
    struct Live(Arc<AtomicUsize>);

    impl Drop for Live {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn never_more_than_the_window_is_alive() {
        for (threads, window) in [(0, 3), (1, 1), (4, 3), (2, 16)] {
            let live = Arc::new(AtomicUsize::new(0));
            let most = Arc::new(AtomicUsize::new(0));
            let counters = (Arc::clone(&live), Arc::clone(&most));
            let mut loader = Loader::new(threads, window, 0, move |_| {
                counters.1.fetch_max(counters.0.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                Live(Arc::clone(&counters.0))
            })
            .unwrap();
            for _ in 0..40 {
                // The consumer is slow, so the window fills up; its own item is dropped before the next is taken.
                std::thread::sleep(Duration::from_millis(1));
                drop(loader.next().unwrap());
            }
            drop(loader);
            let most = most.load(Ordering::SeqCst);
            // One more than the window when the consumer still holds the item that made room for it.
            let expected = if threads == 0 { 1..=1 } else { window..=window + 1 };
            assert!(expected.contains(&most), "{most} alive, window {window}");
            assert_eq!(live.load(Ordering::SeqCst), 0, "dropping the loader drops what was not delivered");
        }
    }

    #[test]
    fn a_panic_is_an_error_at_its_position_and_only_there() {
        for threads in [0, 1, 4] {
            let mut loader = Loader::new(threads, 5, 0, |position| {
                if position == 3 {
                    panic!("cannot do {position}");
                }
                position
            })
            .unwrap();
            for position in 0..12 {
                match loader.next() {
                    Ok(value) => assert!(value == position && position != 3),
                    Err(LoaderError::Panicked { position: 3, message }) => {
                        assert!(position == 3 && message == "cannot do 3");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            let mut loader = Loader::new(threads, 2, 7, |_| -> () { std::panic::panic_any(5) }).unwrap();
            let error = loader.next().unwrap_err().to_string();
            assert_eq!(error, "loader: position 7: worker panicked: without a message");
        }
    }

    #[test]
    fn dropping_a_full_loader_ends_its_threads() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let loader = Loader::new(4, 6, 0, move |position| {
            counter.fetch_add(1, Ordering::SeqCst);
            position
        })
        .unwrap();
        while calls.load(Ordering::SeqCst) < 6 {
            std::thread::yield_now();
        }
        drop(loader);
        // Joined: nothing else holds the counter, so nothing can add to it.
        assert_eq!(Arc::strong_count(&calls), 1);
        assert_eq!(calls.load(Ordering::SeqCst), 6);
    }

    #[test]
    fn waiting_is_measured() {
        let mut busy = Loader::new(1, 1, 0, |_| std::thread::sleep(Duration::from_millis(20))).unwrap();
        (0..3).for_each(|_| busy.next().unwrap());
        assert!(busy.waited() >= Duration::from_millis(30), "{:?}", busy.waited());
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let mut ahead = Loader::new(1, 8, 0, move |_| counter.fetch_add(1, Ordering::SeqCst)).unwrap();
        while calls.load(Ordering::SeqCst) < 8 {
            std::thread::yield_now();
        }
        (0..4).for_each(|_| assert!(ahead.next().is_ok()));
        assert!(ahead.waited() < Duration::from_millis(40), "{:?}", ahead.waited());
    }

    #[test]
    fn a_window_of_zero_is_refused() {
        assert!(matches!(Loader::new(2, 0, 0, |p| p), Err(LoaderError::NoWindow)));
    }
}
