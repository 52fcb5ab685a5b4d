//! One CPU: probe at boot, task switch, step, end. The only place where the real bit is written.

use core::fmt;

use crate::hardware::{
    MsrFault, PreemptionDisabled, TEST_CTRL_SPLIT_LOCK, TestCtrl, ThisCpu, on_the_list,
};
use crate::mode::SldMode;
use crate::smt::{Core, CoreState};
use crate::vcpu::Task;

/// Why the real bit was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The CPU came online.
    Boot,
    /// A vCPU was loaded.
    Load,
    /// A vCPU was put.
    Put,
    /// The next task's flag differs.
    TaskSwitch,
    /// A loaded vCPU's virtual MSR changed: written by the guest or the host, or reset.
    GuestWrite,
    /// A task's split lock was let pass, and with it those to come.
    Warn,
    /// A VM's policy was changed.
    Policy,
    /// A step of one instruction began or ended.
    Step,
    /// A CPU went offline.
    Offline,
}

impl Why {
    /// The name used in events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Load => "load",
            Self::Put => "put",
            Self::TaskSwitch => "task-switch",
            Self::GuestWrite => "guest-write",
            Self::Warn => "warn",
            Self::Policy => "policy",
            Self::Step => "step",
            Self::Offline => "offline",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The real bit of this CPU's core was written (and changed: nothing is ever written twice).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealBit {
    /// Its value now.
    pub on: bool,
    /// The operation that wrote it.
    pub why: Why,
}

/// What an operation did to the real bit: `None` if nothing.
///
/// The error is the platform's fault, not a guest's: 0x33 worked when this CPU came online and
/// faults now. Real bit and flags are then as before the operation.
pub type Written = Result<Option<RealBit>, MsrFault>;

/// What a CPU turned out to be when it came online.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detection {
    /// On the list, and bit 29 can be set and cleared.
    Works,
    /// Not on the list: 0x33 has not been touched, and never is.
    Absent,
    /// On the list, but does not do what it should. To be logged; the CPU runs as `Off`.
    Failed(ProbeFailure),
}

/// What went wrong in the probe of a CPU that is on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeFailure {
    /// 0x33 cannot be read: it does not exist, whatever was enumerated (a hypervisor underneath
    /// hides it). Counts as a CPU without the feature.
    ReadFault,
    /// Writing this value faulted.
    WriteFault(u64),
    /// What was written did not stay.
    ReadBack {
        /// Written.
        wrote: u64,
        /// Read afterwards.
        read: u64,
    },
    /// A sibling thread is online, and this thread does not see the value that it wrote: they do
    /// not share 0x33, and the hypervisor gave them one [`Core`] by mistake.
    NotShared(u64),
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReadFault => f.write_str("MSR 0x33 cannot be read"),
            Self::WriteFault(value) => write!(f, "MSR 0x33 refuses {value:#x}"),
            Self::ReadBack { wrote, read } => {
                write!(f, "MSR 0x33 holds {read:#x} after {wrote:#x} was written")
            }
            Self::NotShared(read) => {
                write!(f, "MSR 0x33 holds {read:#x}, not what a sibling thread wrote")
            }
        }
    }
}

impl core::error::Error for ProbeFailure {}

/// The outcome of [`online`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Online {
    /// Whether this CPU detects split locks, and if not, why.
    pub detection: Detection,
    /// The write that gave the bit its first value; the toggling of the probe is not told apart.
    pub real_bit: Option<RealBit>,
}

/// What the probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) enum Presence {
    /// Not to be touched.
    Absent,
    /// It exists, and is left alone.
    Broken,
    /// This thread is one of those that its core counts.
    Works,
}

/// One CPU (SMT thread). Belongs into the per-CPU data.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Cpu {
    /// What this CPU enforces. Other than `Off` only with a working bit 29.
    pub(crate) mode: SldMode,
    /// What 0x33 is good for; `mode` alone does not tell "off" from "absent".
    pub(crate) test_ctrl: Presence,
    /// The flag of the task that runs: this thread's part of the core's count.
    pub(crate) disabled: bool,
    /// 0x33 as it was at boot without bit 29: the platform's bits.
    pub(crate) platform_bits: u64,
}

impl Cpu {
    /// A CPU that is not online.
    #[must_use]
    pub const fn new() -> Self {
        Self { mode: SldMode::Off, test_ctrl: Presence::Absent, disabled: false, platform_bits: 0 }
    }

    /// The mode that this CPU enforces: the host's, or `Off` where detection is absent or failed.
    #[must_use]
    pub const fn mode(&self) -> SldMode {
        self.mode
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// This CPU comes online and runs a task whose flag is clear, as an idle task's always is.
///
/// `mode` is the host's and the same on every CPU. The first thread of a core verifies that bit
/// 29 can be set and cleared; a sibling only checks that it sees the same MSR, because toggling
/// would switch off detection for those that run already.
pub fn online(guard: &mut impl PreemptionDisabled, mode: SldMode) -> Online {
    let ThisCpu { cpu, core, hardware } = guard.this_cpu();
    debug_assert!(cpu.test_ctrl != Presence::Works, "online already");
    *cpu = Cpu::new();
    if !on_the_list(hardware) {
        return Online { detection: Detection::Absent, real_bit: None };
    }
    match start(cpu, core, hardware, mode) {
        Ok(real_bit) => Online { detection: Detection::Works, real_bit },
        Err(failure) => Online { detection: Detection::Failed(failure), real_bit: None },
    }
}

fn start(
    cpu: &mut Cpu,
    core: &Core,
    hardware: &mut impl TestCtrl,
    mode: SldMode,
) -> Result<Option<RealBit>, ProbeFailure> {
    let mut core = core.lock();
    let found = hardware.read_test_ctrl().map_err(|MsrFault| ProbeFailure::ReadFault)?;
    let found_on = found & TEST_CTRL_SPLIT_LOCK != 0;
    cpu.test_ctrl = Presence::Broken;
    cpu.platform_bits = found & !TEST_CTRL_SPLIT_LOCK;

    let first = core.online == 0;
    if first {
        *core =
            CoreState { online: 0, disabled: 0, on: found_on, boot_on: found_on, stepping: false };
    } else if core.on != found_on {
        return Err(ProbeFailure::NotShared(found));
    }
    let mut next = CoreState { online: core.online + 1, ..*core };
    next.on = wanted(&next, mode);

    if let Err(failure) = bring_to(hardware, first, found, cpu.platform_bits | bit(next.on)) {
        // As well as it can be left.
        if hardware.read_test_ctrl() != Ok(found) {
            let _ = hardware.write_test_ctrl(found);
        }
        return Err(failure);
    }
    *core = next;
    cpu.test_ctrl = Presence::Works;
    cpu.mode = mode;
    Ok((first || next.on != found_on).then_some(RealBit { on: next.on, why: Why::Boot }))
}

/// From the value found to the value wanted, with bit 29 toggled and back before if `toggle`.
fn bring_to(
    hardware: &mut impl TestCtrl,
    toggle: bool,
    found: u64,
    wanted: u64,
) -> Result<(), ProbeFailure> {
    if toggle {
        write_and_compare(hardware, found ^ TEST_CTRL_SPLIT_LOCK)?;
        write_and_compare(hardware, found)?;
    }
    if wanted != found { write_and_compare(hardware, wanted) } else { Ok(()) }
}

fn write_and_compare(hardware: &mut impl TestCtrl, value: u64) -> Result<(), ProbeFailure> {
    hardware.write_test_ctrl(value).map_err(|MsrFault| ProbeFailure::WriteFault(value))?;
    match hardware.read_test_ctrl() {
        Ok(read) if read == value => Ok(()),
        Ok(read) => Err(ProbeFailure::ReadBack { wrote: value, read }),
        Err(MsrFault) => Err(ProbeFailure::ReadFault),
    }
}

/// This CPU leaves VMX operation, or is halted for good: the bit becomes what it was at boot, or
/// with siblings online what they want. No operation but [`online`] may follow on this CPU. Not
/// between this thread's own [`step_begin`] and [`step_end`].
///
/// # Errors
///
/// As [`Written`] says; the CPU then is still online.
pub fn offline(guard: &mut impl PreemptionDisabled) -> Written {
    let mut this = guard.this_cpu();
    let mut written = None;
    if this.cpu.test_ctrl == Presence::Works {
        let mode = this.cpu.mode;
        let disabled = this.cpu.disabled;
        written = this.settle(Why::Offline, |core| {
            core.online -= 1;
            core.disabled -= u8::from(disabled);
            debug_assert!(core.online > 0 || !core.stepping, "the thread that steps goes offline");
            if core.online == 0 { core.boot_on } else { wanted(core, mode) }
        })?;
    }
    *this.cpu = Cpu::new();
    Ok(written)
}

/// The scheduler switches this CPU to `next`.
///
/// Guest state may be loaded in the task that goes: since its flag was toggled with the bit, the
/// comparison here finds what there is to do without knowing of vCPUs.
///
/// # Errors
///
/// As [`Written`] says.
#[inline]
pub fn task_switch(guard: &mut impl PreemptionDisabled, next: &Task) -> Written {
    let mut this = guard.this_cpu();
    if this.cpu.mode == SldMode::Warn && this.cpu.disabled != next.disabled {
        this.run_with(next.disabled, Why::TaskSwitch)
    } else {
        Ok(None)
    }
}

/// One instruction of this thread's guest is about to be stepped, as [`Verdict::Step`] asks, or
/// another verdict comes to it: the bit goes off until [`step_end`], unless it is off already.
///
/// The caller sees to it, from before this call until [`step_end`] has returned, that
///
/// * no other thread of the core is in its guest, for detection is off for all of them. Their
///   hypervisor code may go on, with any operation of this crate but a step of their own: who is
///   online and which flags are set is kept account of, and the bit stays off.
/// * this thread is not preempted, lets its guest execute that one instruction (monitor-trap
///   flag: Intel SDM vol. 3, "Monitor Trap Flag"), and calls nothing here but [`verify`]. Any VM
///   exit ends the step, also one before the instruction has completed: first [`step_end`], then
///   the exit.
///
/// Only in `Warn`. In other modes, where no verdict asks for it, nothing happens.
///
/// # Errors
///
/// As [`Written`] says; no step has begun.
///
/// [`Verdict::Step`]: crate::Verdict::Step
/// [`verify`]: crate::verify
pub fn step_begin(guard: &mut impl PreemptionDisabled) -> Written {
    set_stepping(guard, true)
}

/// The step is over: the bit becomes what the core's threads want by now.
///
/// # Errors
///
/// As [`Written`] says; the core is still stepping, with the bit off, and the siblings' guests
/// must stay where they are.
pub fn step_end(guard: &mut impl PreemptionDisabled) -> Written {
    set_stepping(guard, false)
}

fn set_stepping(guard: &mut impl PreemptionDisabled, stepping: bool) -> Written {
    let mut this = guard.this_cpu();
    let mode = this.cpu.mode;
    if mode != SldMode::Warn {
        return Ok(None);
    }
    this.settle(Why::Step, |core| {
        debug_assert!(core.stepping != stepping, "one step at a time, each ended once");
        core.stepping = stepping;
        wanted(core, mode)
    })
}

/// The bit that a core's threads want. While one of them steps, no other has a guest to protect.
pub(crate) fn wanted(core: &CoreState, mode: SldMode) -> bool {
    match mode {
        SldMode::Off => false,
        SldMode::Warn => core.disabled < core.online && !core.stepping,
        SldMode::Fatal => true,
    }
}

pub(crate) const fn bit(on: bool) -> u64 {
    if on { TEST_CTRL_SPLIT_LOCK } else { 0 }
}

impl<H: TestCtrl> ThisCpu<'_, H> {
    /// From now on this thread runs a task whose flag is `disabled`, which it was not before.
    /// Only in `Warn`: in the other modes the flag says nothing.
    ///
    /// Out of line: this is where the WRMSR is, and the callers, which mostly find that there is
    /// nothing to do, stay a few instructions.
    #[cold]
    #[inline(never)]
    pub(crate) fn run_with(&mut self, disabled: bool, why: Why) -> Written {
        let written = self.settle(why, |core| {
            if disabled {
                core.disabled += 1;
            } else {
                core.disabled -= 1;
            }
            wanted(core, SldMode::Warn)
        })?;
        self.cpu.disabled = disabled;
        Ok(written)
    }

    /// Changes what is known of the core's threads, and writes the bit if `change` returns
    /// another one than there is. The MSR comes first, so that a fault leaves all as it was.
    fn settle(&mut self, why: Why, change: impl FnOnce(&mut CoreState) -> bool) -> Written {
        let mut core = self.core.lock();
        let mut next = *core;
        next.on = change(&mut next);
        let written = if next.on == core.on {
            None
        } else {
            self.hardware.write_test_ctrl(self.cpu.platform_bits | bit(next.on))?;
            Some(RealBit { on: next.on, why })
        };
        *core = next;
        Ok(written)
    }
}
