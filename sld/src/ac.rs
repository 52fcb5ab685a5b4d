//! The verdict on an #AC exit.

use core::fmt;

use crate::cpu::RealBit;
use crate::policy::PerSecond;

/// The guest's state at the #AC, as the VMCS and CR0 have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub struct AcContext {
    /// Current privilege level, 0 to 3. Real mode counts as 0, virtual-8086 mode as 3: the DPL
    /// that VMX stores for SS says both.
    pub cpl: u8,
    /// CR0.AM as the guest sees it.
    pub cr0_am: bool,
    /// RFLAGS.AC.
    pub eflags_ac: bool,
}

impl AcContext {
    /// Whether this may be an ordinary alignment check (Intel SDM vol. 3, "Interrupt 17:
    /// Alignment Check Exception"): only at CPL 3, with CR0.AM and EFLAGS.AC set. It looks the
    /// same as a split lock's #AC, and the guest that asked for alignment checks is owed it.
    #[must_use]
    pub const fn legacy(self) -> bool {
        self.cpl == 3 && self.cr0_am && self.eflags_ac
    }
}

/// What to do with an #AC that a guest raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It is the guest's: deliver #AC with error code 0 (in real mode without one).
    Inject,
    /// Say so if `first`, and resume the guest at the same instruction: detection is off.
    Warn {
        /// This task has not been warned before. Never so if its VM's policy is
        /// [`Off`](crate::Policy::Off): nobody wants to know.
        first: bool,
        /// The write that switched detection off; `None` if it was off already, because
        /// something was changed between exit and verdict.
        real_bit: Option<RealBit>,
    },
    /// Say so if `first`, and let the guest complete this one instruction: by a single step
    /// between [`step_begin`](crate::step_begin) and [`step_end`](crate::step_end), with the
    /// sibling threads held out of their guests. Its next split lock raises #AC again.
    ///
    /// By the VM's policy; and in place of `Warn` where detection stays on for a sibling thread.
    /// To resume without a step would raise the same #AC forever; a hypervisor that cannot step
    /// leaves the siblings offline and these policies out, and if it gets this verdict all the
    /// same, ends the VM as for [`Kill`](Self::Kill).
    Step {
        /// As in `Warn`.
        first: bool,
    },
    /// Say so if `first`, carry the instruction out in software, with the VM's other vCPUs held
    /// out of the guest, and resume after it. Detection stays on.
    Emulate {
        /// As in `Warn`.
        first: bool,
        /// What is to be done with an instruction that the emulator cannot carry out.
        fallback: Fallback,
    },
    /// Say so if `first`, and do as for [`Step`](Self::Step) as soon as the VM's
    /// [`RateLimiter`](crate::RateLimiter) allows it; until then, the vCPU is descheduled. It may
    /// as well be resumed when its time has come, to raise the same #AC.
    Throttle {
        /// As in `Warn`.
        first: bool,
        /// The VM's limit.
        limit: PerSecond,
    },
    /// End this VM, reason "split lock". The others go on.
    Kill,
    /// Detection is off and yet it fired: end this VM, reason "bogus #AC", and say so loudly.
    KillBogus,
}

/// What becomes of an instruction that is to be emulated and cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// As [`Verdict::Step`]: the bus is locked once.
    Step,
    /// As [`Verdict::Kill`]: detection never goes off in this host.
    Kill,
}

impl Verdict {
    /// The name used in events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inject => "inject",
            Self::Warn { .. } => "warn",
            Self::Step { .. } => "step",
            Self::Emulate { .. } => "emulate",
            Self::Throttle { .. } => "throttle",
            Self::Kill => "kill",
            Self::KillBogus => "kill-bogus",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
