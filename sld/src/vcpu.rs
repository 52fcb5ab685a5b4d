//! Tasks and vCPUs: the virtual MSR, load and put, and the verdict.

use core::fmt;

use crate::ac::{AcContext, Fallback, Verdict};
use crate::cpu::{Presence, RealBit, Why, Written};
use crate::hardware::{
    CORE_CAPABILITIES_SPLIT_LOCK, MSR_CORE_CAPABILITIES, MSR_TEST_CTRL, MsrFault,
    PreemptionDisabled, TEST_CTRL_SPLIT_LOCK, TestCtrl, ThisCpu,
};
use crate::mode::{PolicyError, SldMode, VmPolicy};
use crate::policy::Policy;

/// What a CPU runs: a vCPU's thread, or an idle task. Belongs into the task's own data.
///
/// Its flag is "disabled", as are the value that a vCPU saves and the arguments' names: a new
/// task, and every task of a host without detection, has nothing set, and no second polarity
/// exists to be confused with.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Task {
    id: u32,
    /// SLD_DISABLED: this task runs with the real bit off.
    pub(crate) disabled: bool,
    /// A split lock of this task has been reported.
    pub(crate) warned: bool,
}

impl Task {
    /// A task that is no vCPU's, an idle task: it runs with detection as the host has it. `id`
    /// tells it from all other tasks that exist at the same time.
    #[must_use]
    pub const fn new(id: u32) -> Self {
        Self { id, disabled: false, warned: false }
    }

    /// SLD_DISABLED: whether this task runs with the real bit off, as far as it is asked.
    #[inline]
    #[must_use]
    pub const fn is_disabled(&self) -> bool {
        self.disabled
    }

    /// The task of one of this VM's vCPUs. If the VM's policy is `Off`, the flag is set from the
    /// start: the task switch then is all that is needed to have detection off while it runs, and
    /// on while any other task does.
    #[must_use]
    pub const fn of_vcpu(id: u32, vm: VmPolicy) -> Self {
        Self { id, disabled: vm.unloaded_flag(), warned: false }
    }
}

/// The MSRs that a guest may see because of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Msr {
    /// 0x33.
    TestCtrl,
    /// 0xCF.
    CoreCapabilities,
}

impl Msr {
    /// The MSR with this number, if it is one of them.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            MSR_TEST_CTRL => Some(Self::TestCtrl),
            MSR_CORE_CAPABILITIES => Some(Self::CoreCapabilities),
            _ => None,
        }
    }
}

/// The outcome of a write to a guest's MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum MsrWrite {
    /// Nothing has changed; a guest gets #GP(0).
    Gp,
    /// The guest reads it back; the real bit was not written.
    Stored,
    /// Stored, and the real bit was written.
    Propagated(RealBit),
}

impl MsrWrite {
    /// The name used in events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gp => "gp",
            Self::Stored => "stored",
            Self::Propagated(_) => "propagated",
        }
    }
}

impl fmt::Display for MsrWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One vCPU.
///
/// `task` is in all operations the task that runs on this CPU. That is the vCPU's own in all of
/// them but [`host_write`](Self::host_write), which any task may call.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Vcpu {
    vm: VmPolicy,
    /// The virtual MSR.
    msr_test_ctrl: u64,
    /// The task with which it is loaded.
    loaded: Option<u32>,
    /// That task's flag before.
    host_sld_disabled: bool,
}

impl Vcpu {
    /// A vCPU out of RESET.
    #[must_use]
    pub const fn new(vm: VmPolicy) -> Self {
        Self { vm, msr_test_ctrl: 0, loaded: None, host_sld_disabled: false }
    }

    /// What its VM gets.
    #[must_use]
    pub const fn vm(&self) -> VmPolicy {
        self.vm
    }

    /// Whether the guest has switched detection on in its virtual MSR.
    #[inline]
    #[must_use]
    pub const fn virtual_bit(&self) -> bool {
        self.msr_test_ctrl & TEST_CTRL_SPLIT_LOCK != 0
    }

    /// The vCPU's task has been scheduled in and is about to enter the guest: the guest's wish
    /// comes into force.
    ///
    /// Once per scheduling in, not per VM entry: between two entries the task runs hypervisor
    /// code that locks nothing across cache lines, so host state need not be restored before
    /// [`put`](Self::put), and the run loop costs no WRMSR. A repeated load is harmless.
    ///
    /// # Errors
    ///
    /// As [`Written`] says.
    #[inline]
    pub fn load(&mut self, guard: &mut impl PreemptionDisabled, task: &mut Task) -> Written {
        if self.loaded.is_none() {
            self.host_sld_disabled = task.disabled;
        }
        self.loaded = Some(task.id);
        self.update(guard, task, self.wants_on(), Why::Load)
    }

    /// The vCPU's task is scheduled out, migrates, or returns to its caller: it gets back the
    /// flag with which it came, except that a task once warned stays without detection.
    ///
    /// # Errors
    ///
    /// As [`Written`] says; the vCPU then is still loaded.
    #[inline]
    pub fn put(&mut self, guard: &mut impl PreemptionDisabled, task: &mut Task) -> Written {
        if self.loaded.is_none() {
            return Ok(None);
        }
        let written = self.update(guard, task, !self.host_sld_disabled, Why::Put)?;
        self.loaded = None;
        Ok(written)
    }

    /// The guest executes RDMSR; `None` is #GP(0).
    #[inline]
    #[must_use]
    pub const fn guest_rdmsr(&self, msr: Msr) -> Option<u64> {
        match msr {
            Msr::TestCtrl => Some(self.msr_test_ctrl),
            Msr::CoreCapabilities if self.vm.exposed => Some(CORE_CAPABILITIES_SPLIT_LOCK),
            Msr::CoreCapabilities => None,
        }
    }

    /// The guest executes WRMSR.
    ///
    /// # Errors
    ///
    /// As [`Written`] says; the virtual MSR has its new value.
    #[inline]
    pub fn guest_wrmsr(
        &mut self,
        guard: &mut impl PreemptionDisabled,
        task: &mut Task,
        msr: Msr,
        value: u64,
    ) -> Result<MsrWrite, MsrFault> {
        match msr {
            Msr::TestCtrl => self.write(guard, task, value),
            Msr::CoreCapabilities => Ok(MsrWrite::Gp),
        }
    }

    /// The host writes the guest's 0x33: state restored from a snapshot or another machine, a
    /// debugger.
    ///
    /// No check that the vCPU is not loaded: the host may always set guest state. Loaded with
    /// `task`, it takes effect at once; otherwise no hardware is touched, whatever runs here is
    /// none of this vCPU's business, and its next load brings the value into force.
    ///
    /// # Errors
    ///
    /// As for [`guest_wrmsr`](Self::guest_wrmsr).
    #[inline]
    pub fn host_write(
        &mut self,
        guard: &mut impl PreemptionDisabled,
        task: &mut Task,
        value: u64,
    ) -> Result<MsrWrite, MsrFault> {
        self.write(guard, task, value)
    }

    /// The vCPU is reset, by RESET or INIT: at once in force if it is loaded, else with its next
    /// load. It stays loaded. `task` is its own here as well: an INIT from elsewhere is for the CPU
    /// that runs the vCPU to carry out, or to be kept until one does.
    ///
    /// # Errors
    ///
    /// As for [`guest_wrmsr`](Self::guest_wrmsr).
    pub fn reset(&mut self, guard: &mut impl PreemptionDisabled, task: &mut Task) -> Written {
        self.msr_test_ctrl = 0;
        self.propagate(guard, task)
    }

    /// The guest raised #AC. Where CPUs differ in what they detect, to be asked on the CPU that took
    /// the exit.
    ///
    /// # Errors
    ///
    /// As [`Written`] says.
    #[inline]
    pub fn on_ac(
        &mut self,
        guard: &mut impl PreemptionDisabled,
        task: &mut Task,
        ac: AcContext,
    ) -> Result<Verdict, MsrFault> {
        let mut this = guard.this_cpu();
        if this.cpu.test_ctrl == Presence::Absent || ac.legacy() {
            return Ok(Verdict::Inject);
        }
        let mode = this.cpu.mode;
        if mode == SldMode::Off {
            return Ok(Verdict::KillBogus);
        }
        if self.vm.exposed && self.virtual_bit() {
            return Ok(Verdict::Inject);
        }
        let policy = self.vm.policy();
        // Granted for another host, by mistake: what this one promises goes before.
        if !policy.is_kept_by(mode) {
            return Ok(Verdict::Kill);
        }
        let first = !task.warned && policy != Policy::Off;
        let verdict = match policy {
            Policy::Off | Policy::Warn => this.let_pass(task, first)?,
            Policy::Step => Verdict::Step { first },
            Policy::Emulate => Verdict::Emulate {
                first,
                fallback: if mode == SldMode::Warn { Fallback::Step } else { Fallback::Kill },
            },
            Policy::RateLimit(limit) => Verdict::Throttle { first, limit },
            Policy::Fatal => return Ok(Verdict::Kill),
        };
        task.warned |= first;
        Ok(verdict)
    }

    /// The VM's policy changes; to be called for each of its vCPUs, on the CPU that runs the
    /// vCPU's own task, loaded or not.
    ///
    /// All is then as if the task had been created with the new policy, and the vCPU loaded now if
    /// it is: what the old policy did to the flag is undone, the task will be warned again. The
    /// virtual MSR stays, and so does what the guest is told. An #AC that waits for its verdict
    /// gets that of the new policy.
    ///
    /// # Errors
    ///
    /// [`PolicyError`], as for [`VmPolicy::new`]. In the result else, as [`Written`] says; the
    /// policy then is the old one, too.
    pub fn set_policy(
        &mut self,
        guard: &mut impl PreemptionDisabled,
        task: &mut Task,
        policy: Policy,
    ) -> Result<Written, PolicyError> {
        let vm = self.vm.with(policy)?;
        let next = Self { vm, host_sld_disabled: vm.unloaded_flag(), ..*self };
        Ok(next.start_over(guard, task).inspect(|_| *self = next))
    }

    /// `task` gets the flag, and the CPU the bit, that it had if it were new.
    fn start_over(&self, guard: &mut impl PreemptionDisabled, task: &mut Task) -> Written {
        let mut this = guard.this_cpu();
        let mut written = None;
        if this.cpu.mode == SldMode::Warn {
            let guests = self.loaded.is_some() && self.has_say();
            let disabled = if guests { !self.wants_on() } else { self.host_sld_disabled };
            if task.disabled != disabled {
                written = this.set_disabled(task, disabled, Why::Policy)?;
            }
        } else {
            // Only for the CPUs that detect, should it go to one.
            task.disabled = self.host_sld_disabled;
        }
        task.warned = false;
        Ok(written)
    }

    #[inline(always)]
    fn write(
        &mut self,
        guard: &mut impl PreemptionDisabled,
        task: &mut Task,
        value: u64,
    ) -> Result<MsrWrite, MsrFault> {
        let valid = if self.vm.exposed { TEST_CTRL_SPLIT_LOCK } else { 0 };
        if value & !valid != 0 {
            return Ok(MsrWrite::Gp);
        }
        self.msr_test_ctrl = value;
        Ok(self.propagate(guard, task)?.map_or(MsrWrite::Stored, MsrWrite::Propagated))
    }

    /// The virtual MSR has changed: the guest's wish comes into force if it is loaded here.
    #[inline]
    fn propagate(&self, guard: &mut impl PreemptionDisabled, task: &mut Task) -> Written {
        if self.loaded == Some(task.id) {
            self.update(guard, task, self.wants_on(), Why::GuestWrite)
        } else {
            Ok(None)
        }
    }

    /// What is wanted of the real bit while the guest runs: on by a policy that is to see all its
    /// split locks, else what the guest wants.
    #[inline]
    const fn wants_on(&self) -> bool {
        self.vm.policy().sees_all() || self.virtual_bit()
    }

    /// Whether anything is: a guest that knows of no 0x33 wishes nothing.
    #[inline]
    const fn has_say(&self) -> bool {
        self.vm.policy().sees_all() || self.vm.exposed
    }

    /// Bit and flag follow the guest's wish, or the host's on put.
    ///
    /// Only in `Warn`. In `Fatal` the host has promised itself that the bit is on from boot to
    /// shutdown, so a guest's write is stored, for the guest to read back, and goes no further;
    /// no architectural way exists to tell the guest that its MSR is not the real one. Only for
    /// a vCPU that has a say.
    #[inline(always)]
    fn update(
        &self,
        guard: &mut impl PreemptionDisabled,
        task: &mut Task,
        on: bool,
        why: Why,
    ) -> Written {
        let mut this = guard.this_cpu();
        if this.cpu.mode == SldMode::Warn && self.has_say() && task.disabled == on {
            this.set_disabled(task, !on, why)
        } else {
            Ok(None)
        }
    }
}

impl<H: TestCtrl> ThisCpu<'_, H> {
    /// Toggles the running task's flag and the real bit, always both: the task switch compares
    /// flags and not bits, so a flag that says what the bit is makes it do the right thing when
    /// this task is preempted with guest state loaded.
    fn set_disabled(&mut self, task: &mut Task, disabled: bool, why: Why) -> Written {
        debug_assert_eq!(self.cpu.disabled, task.disabled, "not the task that runs here");
        let written = self.run_with(disabled, why)?;
        task.disabled = disabled;
        Ok(written)
    }

    /// A split lock of the running task is let pass, and with it all later ones, as far as the
    /// siblings allow.
    fn let_pass(&mut self, task: &mut Task, first: bool) -> Result<Verdict, MsrFault> {
        let already = task.disabled;
        let real_bit = if already { None } else { self.set_disabled(task, true, Why::Warn)? };
        // Where the bit just went off, or was off without a sibling's say, the instruction now
        // completes by itself. With siblings online and the flag set before, the bit may be on
        // or off as they please, now or when the guest is resumed: only a step is sure to end.
        Ok(if real_bit.is_some() || (already && !self.core.has_siblings()) {
            Verdict::Warn { first, real_bit }
        } else {
            Verdict::Step { first }
        })
    }
}
