//! What others post to a vCPU: IPIs, and word that its VM wants something of it.
//!
//! Any CPU posts at any time, without a lock; the CPU that has the vCPU takes all of it at once.
//!
//! **Nothing is slept through.** Whoever posts then looks where the vCPU is, and kicks that CPU or
//! wakes the vCPU; a vCPU that is about to enter its guest or to sleep first says so, then looks
//! into its mailbox. Each side stores in one word, then loads the other one's, and at least one of
//! them must see what the other has stored. So there must be one order of all four that all CPUs
//! agree on: here they are SeqCst ([`Mailbox::post`] ends with a read-modify-write,
//! [`Mailbox::is_empty`] is a load); the word that says where the vCPU is needs the same, or
//! SeqCst fences on both sides.
//!
//! **Nothing is lost.** A vector's bit is set before its signal, [`Signals::INTERRUPT`], and taken
//! after it. The signal's read-modify-write releases the bit to the swap that takes the signal,
//! also if other posts came between the two. A bit that is taken earlier than its signal leaves
//! a signal without vectors behind, which does no harm.

use core::sync::atomic::Ordering;
#[cfg(not(all(test, loom)))]
use core::sync::atomic::{AtomicU32, AtomicU64};
#[cfg(all(test, loom))]
use loom::sync::atomic::{AtomicU32, AtomicU64};

use bitflags::bitflags;

use crate::apic::Delivery;

bitflags! {
    /// What sort of mail there is.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Signals: u32 {
        /// Vectors to raise.
        const INTERRUPT = 1 << 0;
        /// A non-maskable interrupt.
        const NMI = 1 << 1;
        /// INIT.
        const INIT = 1 << 2;
        /// A start-up IPI, its vector in bits 31:24.
        const SIPI = 1 << 3;
        /// The VM is over.
        const END = 1 << 4;
        /// The VM's gate has changed: look at it again.
        const GATE = 1 << 5;
        /// The VM's policy has changed.
        const POLICY = 1 << 6;
        /// The host wants to know what the vCPU has counted.
        const INSPECT = 1 << 7;
    }
}

/// Where the vector of a start-up IPI stands among the signals.
const SIPI_VECTOR_SHIFT: u32 = 24;
/// What INIT takes back: the interrupts and the start that came before it.
const BEFORE_INIT: u32 =
    Signals::INTERRUPT.union(Signals::NMI).union(Signals::SIPI).bits() | 0xff << SIPI_VECTOR_SHIFT;

/// What was posted to a vCPU and is not taken yet.
#[derive(Debug)]
pub struct Mailbox {
    /// Vectors to raise, one bit each.
    irr: [AtomicU64; 4],
    signals: AtomicU32,
}

/// What [`Mailbox::take`] takes. To be handled in this order: INIT, SIPI, NMI, the vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mail {
    /// What there is.
    pub signals: Signals,
    /// The vectors to raise, one bit each. None with INIT: the local APIC is off after it.
    pub vectors: [u64; 4],
    /// The start-up IPI's vector, if there is one.
    pub sipi_vector: u8,
}

impl Mailbox {
    /// An empty one.
    #[cfg(not(all(test, loom)))]
    pub const fn new() -> Self {
        Self { irr: [const { AtomicU64::new(0) }; 4], signals: AtomicU32::new(0) }
    }

    /// An empty one.
    #[cfg(all(test, loom))]
    pub fn new() -> Self {
        Self { irr: core::array::from_fn(|_| AtomicU64::new(0)), signals: AtomicU32::new(0) }
    }

    /// Posts an interprocessor interrupt.
    ///
    /// INIT takes back the interrupts and the start-up IPI that came before it, as it resets the
    /// vCPU that would have got them; what comes after it stays. Of several start-up IPIs the first
    /// counts, as a CPU that has started ignores them. [`Delivery::Other`] is nothing.
    pub fn post(&self, delivery: Delivery) {
        match delivery {
            Delivery::Fixed(vector) => {
                let word = &self.irr[usize::from(vector / 64)];
                // Relaxed: the signal below releases it.
                word.fetch_or(1 << (vector % 64), Ordering::Relaxed);
                self.signal(Signals::INTERRUPT);
            }
            Delivery::Nmi => self.signal(Signals::NMI),
            Delivery::Init => {
                self.update(|signals| signals & !BEFORE_INIT | Signals::INIT.bits());
            }
            Delivery::Startup(vector) => {
                let vector = u32::from(vector) << SIPI_VECTOR_SHIFT;
                self.update(|signals| match signals & Signals::SIPI.bits() {
                    0 => signals | Signals::SIPI.bits() | vector,
                    _ => signals,
                });
            }
            Delivery::Other => {}
        }
    }

    /// The VM is over.
    pub fn post_end(&self) {
        self.signal(Signals::END);
    }

    /// The VM's gate has changed.
    pub fn post_gate(&self) {
        self.signal(Signals::GATE);
    }

    /// The VM's policy has changed.
    pub fn post_policy(&self) {
        self.signal(Signals::POLICY);
    }

    /// The host wants to know what the vCPU has counted.
    pub fn post_inspect(&self) {
        self.signal(Signals::INSPECT);
    }

    fn signal(&self, signal: Signals) {
        self.signals.fetch_or(signal.bits(), Ordering::SeqCst);
    }

    /// A read-modify-write also where nothing changes: [`Self::post`] ends with one.
    fn update(&self, change: impl Fn(u32) -> u32) {
        let mut before = self.signals.load(Ordering::Relaxed);
        while let Err(other) = self.signals.compare_exchange_weak(
            before,
            change(before),
            Ordering::SeqCst,
            Ordering::Relaxed,
        ) {
            before = other;
        }
    }

    /// Whether nothing waits.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.signals.load(Ordering::SeqCst) == 0
    }

    /// Takes everything that waits.
    #[inline]
    pub fn take(&self) -> Option<Mail> {
        if self.is_empty() { None } else { self.take_some() }
    }

    #[inline(never)]
    fn take_some(&self) -> Option<Mail> {
        let taken = self.signals.swap(0, Ordering::SeqCst);
        let signals = Signals::from_bits_truncate(taken);
        let mut vectors = [0; 4];
        if signals.intersects(Signals::INTERRUPT | Signals::INIT) {
            // Relaxed: the swap above has acquired what belongs to its signals.
            vectors = self.irr.each_ref().map(|word| word.swap(0, Ordering::Relaxed));
        }
        if signals.contains(Signals::INIT) {
            vectors = [0; 4];
        }
        let sipi_vector = (taken >> SIPI_VECTOR_SHIFT) as u8;
        (!signals.is_empty()).then_some(Mail { signals, vectors, sipi_vector })
    }
}

impl Default for Mailbox {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::{Duration, Instant};

    const SIPI_7: Delivery = Delivery::Startup(7);

    fn posted(deliveries: &[Delivery]) -> Mail {
        let mailbox = Mailbox::new();
        deliveries.iter().for_each(|delivery| mailbox.post(*delivery));
        let mail = mailbox.take().unwrap();
        assert_eq!((mailbox.is_empty(), mailbox.take()), (true, None));
        mail
    }

    #[test]
    fn what_is_posted_is_taken_once() {
        let mailbox = Mailbox::new();
        assert_eq!((mailbox.is_empty(), mailbox.take()), (true, None));
        mailbox.post(Delivery::Other);
        assert!(mailbox.is_empty());
        mailbox.post(Delivery::Fixed(0));
        mailbox.post(Delivery::Fixed(255));
        mailbox.post(Delivery::Fixed(64));
        mailbox.post(Delivery::Nmi);
        mailbox.post_gate();
        assert!(!mailbox.is_empty());
        let signals = Signals::INTERRUPT | Signals::NMI | Signals::GATE;
        let vectors = [1, 1, 0, 1 << 63];
        assert_eq!(mailbox.take(), Some(Mail { signals, vectors, sipi_vector: 0 }));
        assert_eq!((mailbox.is_empty(), mailbox.take()), (true, None));
        mailbox.post_end();
        let signals = Signals::END;
        assert_eq!(mailbox.take(), Some(Mail { signals, vectors: [0; 4], sipi_vector: 0 }));
    }

    #[test]
    fn init_takes_back_what_came_before_it_and_nothing_else() {
        let all = [Delivery::Fixed(0x40), Delivery::Nmi, SIPI_7, Delivery::Init];
        let init = Mail { signals: Signals::INIT, vectors: [0; 4], sipi_vector: 0 };
        assert_eq!(posted(&all), init);
        let started = Mail { signals: Signals::INIT | Signals::SIPI, sipi_vector: 7, ..init };
        assert_eq!(posted(&[Delivery::Init, SIPI_7]), started);
        assert_eq!(posted(&[Delivery::Startup(8), Delivery::Init, SIPI_7]), started);
        let nmi = Mail { signals: started.signals | Signals::NMI, ..started };
        assert_eq!(posted(&[Delivery::Init, SIPI_7, Delivery::Nmi]), nmi);
        // The APIC is off after INIT: what is raised then is not kept for when it is on.
        let interrupt = Mail { signals: started.signals | Signals::INTERRUPT, ..started };
        assert_eq!(posted(&[Delivery::Init, SIPI_7, Delivery::Fixed(0x40)]), interrupt);

        let mailbox = Mailbox::new();
        mailbox.post_end();
        mailbox.post_gate();
        mailbox.post_policy();
        mailbox.post_inspect();
        mailbox.post(Delivery::Fixed(0x40));
        mailbox.post(Delivery::Init);
        let signals =
            Signals::INIT | Signals::END | Signals::GATE | Signals::POLICY | Signals::INSPECT;
        assert_eq!(mailbox.take(), Some(Mail { signals, ..init }));
        mailbox.post(Delivery::Fixed(0x41));
        assert_eq!(mailbox.take().unwrap().vectors, [0, 2, 0, 0], "without the one before INIT");
    }

    #[test]
    fn the_first_start_counts() {
        let twice = [Delivery::Startup(0xff), SIPI_7];
        let mail = posted(&twice);
        assert_eq!((mail.signals, mail.sipi_vector), (Signals::SIPI, 0xff));
        assert_eq!(posted(&[Delivery::Startup(0)]).signals, Signals::SIPI);
    }

    /// Waits for a condition on another thread, but not for ever.
    fn wait(what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        let mut spins = 0;
        while !condition() {
            spins += 1;
            if spins % 1000 == 0 {
                assert!(start.elapsed() < Duration::from_secs(30), "{what}");
                thread::yield_now();
            }
        }
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        const ROUNDS: u32 = 20_000;
        // Two in one word, next to each other in time, and others while the first are taken.
        let posts =
            [Delivery::Fixed(0x40), Delivery::Fixed(0x41), Delivery::Fixed(0xf0), Delivery::Nmi];
        let mailbox = Mailbox::new();
        let arrived = posts.map(|_| AtomicU32::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    posts.iter().for_each(|delivery| mailbox.post(*delivery));
                    for count in &arrived {
                        wait("a post is lost", || count.load(Ordering::Relaxed) == round);
                    }
                }
            });
            for round in 1..=ROUNDS {
                let missing = || arrived.iter().any(|count| count.load(Ordering::Relaxed) != round);
                while missing() {
                    wait("a post is lost", || !mailbox.is_empty());
                    let mail = mailbox.take().unwrap();
                    let mut vectors = mail.vectors;
                    for (delivery, count) in posts.iter().zip(&arrived) {
                        let came = match *delivery {
                            Delivery::Fixed(vector) => {
                                let (word, bit) = (usize::from(vector / 64), 1 << (vector % 64));
                                let came = vectors[word] & bit != 0;
                                vectors[word] &= !bit;
                                came
                            }
                            _ => mail.signals.contains(Signals::NMI),
                        };
                        let before = count.fetch_add(came.into(), Ordering::Relaxed);
                        assert!(before + u32::from(came) <= round, "{delivery:?} came twice");
                    }
                    assert_eq!(vectors, [0; 4], "nobody has posted these");
                }
            }
        });
    }

    #[test]
    fn nobody_sleeps_through_its_mail() {
        const ROUNDS: u32 = 20_000;
        let mailbox = Mailbox::new();
        let asleep = AtomicBool::new(false);
        let taken = AtomicU32::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    mailbox.post(Delivery::Nmi);
                    // Once only, as the kick of a sender.
                    if asleep.load(Ordering::SeqCst) {
                        asleep.store(false, Ordering::SeqCst);
                    }
                    wait("the sleeper does not wake", || taken.load(Ordering::SeqCst) == round);
                }
            });
            while taken.load(Ordering::SeqCst) != ROUNDS {
                asleep.store(true, Ordering::SeqCst);
                if mailbox.is_empty() {
                    wait("nobody wakes the sleeper", || !asleep.load(Ordering::SeqCst));
                }
                asleep.store(false, Ordering::SeqCst);
                if let Some(mail) = mailbox.take() {
                    assert_eq!(mail.signals, Signals::NMI);
                    taken.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    }
}

/// All interleavings: `RUSTFLAGS="--cfg loom" cargo test -p vmx --release mailbox`.
#[cfg(all(test, loom))]
mod interleavings {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;
    use std::vec::Vec;

    fn post(mailbox: &Arc<Mailbox>, deliveries: &'static [Delivery]) -> thread::JoinHandle<()> {
        let mailbox = mailbox.clone();
        thread::spawn(move || deliveries.iter().for_each(|delivery| mailbox.post(*delivery)))
    }

    /// What is taken while the posts of others come in, and after them.
    fn take(mailbox: &Mailbox, posts: Vec<thread::JoinHandle<()>>) -> Vec<Mail> {
        let mut mail: Vec<Mail> = (0..2).filter_map(|_| mailbox.take()).collect();
        posts.into_iter().for_each(|post| post.join().unwrap());
        mail.extend(mailbox.take());
        assert!(mailbox.is_empty());
        mail
    }

    #[test]
    fn what_is_posted_comes_once() {
        loom::model(|| {
            let mailbox = Arc::new(Mailbox::new());
            let posts = Vec::from([
                post(&mailbox, &[Delivery::Fixed(0x41)]),
                post(&mailbox, &[Delivery::Fixed(0x42), Delivery::Nmi]),
            ]);
            let mut vectors = [0; 4];
            let mut nmis = 0;
            for mail in take(&mailbox, posts) {
                nmis += u32::from(mail.signals.contains(Signals::NMI));
                for (all, new) in vectors.iter_mut().zip(mail.vectors) {
                    assert_eq!(*all & new, 0, "twice");
                    *all |= new;
                }
            }
            assert_eq!((vectors, nmis), ([0, 6, 0, 0], 1));
        });
    }

    #[test]
    fn the_start_after_init_is_the_one_that_counts() {
        loom::model(|| {
            let mailbox = Arc::new(Mailbox::new());
            let twice =
                &[Delivery::Startup(1), Delivery::Init, Delivery::Startup(7), Delivery::Startup(8)];
            let posts = post(&mailbox, twice);
            let mail = take(&mailbox, Vec::from([posts]));
            let resets = mail.iter().filter(|mail| mail.signals.contains(Signals::INIT));
            assert_eq!(resets.count(), 1);
            let mut after_init =
                mail.iter().skip_while(|mail| !mail.signals.contains(Signals::INIT));
            let start = after_init.find(|mail| mail.signals.contains(Signals::SIPI)).unwrap();
            assert_eq!(start.sipi_vector, 7);
        });
    }
}
