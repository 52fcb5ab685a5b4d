//! What the SMT threads of one core share: the real bit.
//!
//! 0x33 has core scope, so two threads that each wrote their own guest's wish would overwrite
//! each other. The bit is therefore decided from what all online threads of the core run: it is
//! off only if every one of them runs a task with the flag set. In all other cases it stays on,
//! and the tasks with the flag set hit #ACs that are not meant for their guests:
//! [`Verdict::Step`](crate::Verdict::Step). Its one instruction is the exception: while a thread
//! steps, the bit is off whatever the others run, since their guests are held out.

use core::hint;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU32, Ordering};

/// The shared state of one core. All SMT siblings are given the same one
/// ([`ThisCpu::core`](crate::ThisCpu::core)); a CPU without siblings has its own.
///
/// One word with a lock bit. The lock is held while the threads are counted and the MSR is
/// written, since the order of the writes must be that of the decisions; it is taken only when a
/// flag changes under a thread, which without a sibling means a WRMSR anyway. Threads of other
/// cores never meet here.
#[derive(Debug)]
pub struct Core(pub(crate) AtomicU32);

pub(crate) const LOCKED: u32 = 1 << 31;
const ON: u32 = 1 << 30;
const BOOT_ON: u32 = 1 << 29;
const STEPPING: u32 = 1 << 28;
const ONLINE_SHIFT: u32 = 8;

impl Core {
    /// A core of which no thread is online.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Waits for the siblings, each for the time of a WRMSR at most. The caller holds a
    /// [`PreemptionDisabled`](crate::PreemptionDisabled), so the holder is never descheduled.
    #[inline]
    pub(crate) fn lock(&self) -> CoreGuard<'_> {
        loop {
            let word = self.0.load(Ordering::Relaxed) & !LOCKED;
            let locked = word | LOCKED;
            match self.0.compare_exchange_weak(word, locked, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => {
                    return CoreGuard { core: self, state: CoreState::unpack(word) };
                }
                Err(_) => hint::spin_loop(),
            }
        }
    }

    /// Whether another thread than the caller's is online, without waiting.
    #[inline]
    pub(crate) fn has_siblings(&self) -> bool {
        CoreState::unpack(self.0.load(Ordering::Relaxed)).online > 1
    }
}

impl Default for Core {
    fn default() -> Self {
        Self::new()
    }
}

/// What [`Core`] says, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CoreState {
    /// Threads online.
    pub(crate) online: u8,
    /// Those of them that run a task with the flag set.
    pub(crate) disabled: u8,
    /// The real bit.
    pub(crate) on: bool,
    /// The real bit as the first thread found it.
    pub(crate) boot_on: bool,
    /// One thread's guest executes one instruction with the bit off, the others execute none.
    pub(crate) stepping: bool,
}

impl CoreState {
    #[inline]
    const fn unpack(word: u32) -> Self {
        Self {
            online: (word >> ONLINE_SHIFT) as u8,
            disabled: word as u8,
            on: word & ON != 0,
            boot_on: word & BOOT_ON != 0,
            stepping: word & STEPPING != 0,
        }
    }

    #[inline]
    const fn pack(self) -> u32 {
        (self.online as u32) << ONLINE_SHIFT
            | self.disabled as u32
            | if self.on { ON } else { 0 }
            | if self.boot_on { BOOT_ON } else { 0 }
            | if self.stepping { STEPPING } else { 0 }
    }
}

/// The locked core; unlocks when dropped.
pub(crate) struct CoreGuard<'a> {
    core: &'a Core,
    state: CoreState,
}

impl Deref for CoreGuard<'_> {
    type Target = CoreState;

    #[inline]
    fn deref(&self) -> &CoreState {
        &self.state
    }
}

impl DerefMut for CoreGuard<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut CoreState {
        &mut self.state
    }
}

impl Drop for CoreGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.core.0.store(self.state.pack(), Ordering::Release);
    }
}
