//! Split-lock detection for hypervisors: the policy, the guest's MSR and the verdict on #AC, with
//! the hardware behind one small trait.
//!
//! A split lock is a locked access that crosses a cache line. It takes the bus lock, for thousands
//! of cycles that every core feels. CPUs since Ice Lake raise #AC instead while bit 29 of
//! MSR_TEST_CTRL (0x33) is set. Both the host and its guests have a use for that bit, and there is
//! one per core. This crate decides its value, always, and nobody else does:
//!
//! * **[`SldMode`]**, the host's policy: `Off`, `Warn`, `Fatal`. A VM may ask for a stricter one
//!   ([`VmPolicy`]).
//! * **[`Cpu`]** and **[`Core`]**: the real bit, whose other 63 neighbours stay as the firmware left
//!   them. SMT siblings share a core's bit, and none loses detection to another.
//! * **[`Task`]**: what a CPU runs, with the flag "detection is disabled while this runs".
//! * **[`Vcpu`]**: the virtual 0x33 and 0xCF of one vCPU.
//!
//! The caller tells what happens and is told what to do; it neither reads the mode nor sees the
//! flag.
//!
//! | what happens | call | what comes back |
//! |---|---|---|
//! | a CPU comes online | [`online`] | whether it detects |
//! | the scheduler switches | [`task_switch`] | [`Written`] |
//! | a vCPU's task is scheduled in, out | [`Vcpu::load`], [`Vcpu::put`] | [`Written`] |
//! | RDMSR, WRMSR exit for 0x33 or 0xCF | [`Vcpu::guest_rdmsr`], [`Vcpu::guest_wrmsr`] | a value or #GP; [`MsrWrite`] |
//! | the host sets the guest's 0x33 | [`Vcpu::host_write`] | [`MsrWrite`] |
//! | RESET, INIT | [`Vcpu::reset`] | [`Written`] |
//! | #AC exit | [`Vcpu::on_ac`] | [`Verdict`] |
//! | a [`Verdict::Step`] is carried out | [`step_begin`], [`step_end`] | [`Written`] |
//! | a CPU goes offline | [`offline`] | [`Written`] |
//! | a test build looks whether all is well | [`verify`] | [`Violation`] |
//!
//! Whatever wrote the real bit says so ([`RealBit`]), for counters and traces; no value is ever
//! written over itself.
//!
//! # Putting it into a hypervisor
//!
//! 1. Implement [`TestCtrl`] with accesses that survive a #GP, and [`PreemptionDisabled`] for the
//!    guard behind which per-CPU data lives. Keep a [`Cpu`] per logical CPU, a [`Core`] per core, a
//!    [`Task`] per thread (idle threads too), a [`Vcpu`] per vCPU.
//! 2. Bring all CPUs [`online`] before VMs are made, and make their [`VmPolicy`] with the weakest
//!    [`Cpu::mode`] of them.
//! 3. In the guest's CPUID, set [`CPUID_CORE_CAPABILITIES`] iff [`VmPolicy::exposed`]. Intercept
//!    accesses to 0x33 and 0xCF, and #AC, always: without the intercept, a guest whose #AC handler
//!    raises #AC again keeps the CPU in microcode.
//! 4. Call [`task_switch`] in the scheduler, [`Vcpu::load`] at each scheduling in of a vCPU's task
//!    and [`Vcpu::put`] before the task leaves.
//!
//! ```
//! use sld::{
//!     AcContext, Core, Cpu, Host, Msr, MsrFault, MsrWrite, PreemptionDisabled, RealBit, SldMode,
//!     Task, TestCtrl, ThisCpu, Vcpu, Verdict, VmPolicy, Why, online, task_switch,
//! };
//!
//! /// Stands for the CPU's instructions: an Ice Lake client.
//! struct Hardware(u64);
//!
//! impl TestCtrl for Hardware {
//!     fn cpuid(&mut self, leaf: u32, _: u32) -> [u32; 4] {
//!         match leaf {
//!             0 => [7, 0x756E_6547, 0x6C65_746E, 0x4965_6E69],
//!             1 => [0x706E5, 0, 0, 0],
//!             _ => [0; 4],
//!         }
//!     }
//!     fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
//!         Err(MsrFault)
//!     }
//!     fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
//!         Ok(self.0)
//!     }
//!     fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
//!         self.0 = value;
//!         Ok(())
//!     }
//! }
//!
//! /// Stands for the hypervisor's guard of its per-CPU data.
//! struct PerCpu { cpu: Cpu, core: Core, hardware: Hardware }
//!
//! impl PreemptionDisabled for PerCpu {
//!     type Hardware = Hardware;
//!     fn this_cpu(&mut self) -> ThisCpu<'_, Hardware> {
//!         ThisCpu { cpu: &mut self.cpu, core: &self.core, hardware: &mut self.hardware }
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut guard = PerCpu { cpu: Cpu::new(), core: Core::new(), hardware: Hardware(0) };
//! let mode: SldMode = "warn".parse()?;
//! assert_eq!(online(&mut guard, mode).real_bit, Some(RealBit { on: true, why: Why::Boot }));
//! let host = Host { configured: mode, enforced: guard.cpu.mode() };
//!
//! // A guest that is told of the feature: out of reset its bit is clear, and so is the real one.
//! let mut aware = Vcpu::new(VmPolicy::new(host, None, true)?);
//! let mut its_task = Task::new(1);
//! task_switch(&mut guard, &its_task)?;
//! assert_eq!(
//!     aware.load(&mut guard, &mut its_task)?,
//!     Some(RealBit { on: false, why: Why::Load })
//! );
//! // It sets its bit: from then on, its split locks are its own.
//! let outcome = aware.guest_wrmsr(&mut guard, &mut its_task, Msr::TestCtrl, 1 << 29)?;
//! assert_eq!(outcome, MsrWrite::Propagated(RealBit { on: true, why: Why::GuestWrite }));
//! let kernel_mode = AcContext { cpl: 0, cr0_am: true, eflags_ac: false };
//! assert_eq!(aware.on_ac(&mut guard, &mut its_task, kernel_mode)?, Verdict::Inject);
//! aware.put(&mut guard, &mut its_task)?;
//!
//! // One that is not told is warned once, and runs without detection from then on...
//! let mut unaware = Vcpu::new(VmPolicy::new(host, None, false)?);
//! let mut another = Task::new(2);
//! task_switch(&mut guard, &another)?;
//! unaware.load(&mut guard, &mut another)?;
//! assert_eq!(
//!     unaware.on_ac(&mut guard, &mut another, kernel_mode)?,
//!     Verdict::Warn { first: true, real_bit: Some(RealBit { on: false, why: Why::Warn }) }
//! );
//! unaware.put(&mut guard, &mut another)?;
//! // ... but it alone.
//! assert_eq!(
//!     task_switch(&mut guard, &its_task)?,
//!     Some(RealBit { on: true, why: Why::TaskSwitch })
//! );
//! # Ok(())
//! # }
//! ```
//!
//! # SMT
//!
//! While siblings are online, the bit is off only if all of them run tasks that have it disabled.
//! A guest whose wish to have it off is not granted gets [`Verdict::Step`] for its split locks. To
//! carry it out:
//!
//! 1. Hold the core's other threads out of their guests, and wait until they are. Threads that
//!    want to step wait for each other here: one of a core at a time.
//! 2. [`step_begin`]: the bit is off, whatever the siblings' hypervisor code does meanwhile.
//! 3. Enter the guest with the monitor-trap flag set, for one instruction. Nothing is injected but
//!    an event whose delivery the #AC interrupted: that delivery then is what is stepped.
//! 4. At the exit, whichever it is, [`step_end`] before anything else: the bit is again what the
//!    threads want.
//! 5. Let the siblings go.
//!
//! A hypervisor that can neither single-step nor emulate must run one thread per core.
//!
//! # How it is checked
//!
//! `src/check` explores every order of all operations in small systems (one and two CPUs, one core
//! or two, every mode, pairs of VMs of all kinds, preemption and migration between any two steps,
//! hardware that lacks the bit or fails, steps with a sibling doing anything meanwhile) against a
//! separate model of the hardware, and the invariants of its `system.rs` must hold in every state;
//! random long sequences do the same for systems of four CPUs. [`verify`] must agree in each, and
//! must notice when one is damaged. `tests/mutants.rs` seeds faults into this source, and all must be found.
//! `tests/verdicts.csv` is the verdict table expanded to every input.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod ac;
#[cfg(test)]
mod check;
mod cpu;
mod hardware;
mod mode;
mod smt;
mod vcpu;
mod verify;

pub use ac::{AcContext, Verdict};
pub use cpu::{Cpu, Detection, Online, ProbeFailure, RealBit, Why, Written};
pub use cpu::{offline, online, step_begin, step_end, task_switch};
pub use hardware::{
    CORE_CAPABILITIES_SPLIT_LOCK, CPUID_CORE_CAPABILITIES, MSR_CORE_CAPABILITIES, MSR_TEST_CTRL,
    MsrFault, PreemptionDisabled, TEST_CTRL_SPLIT_LOCK, TestCtrl, ThisCpu,
};
pub use mode::{Host, PolicyError, SldMode, UnknownMode, VmPolicy};
pub use smt::Core;
pub use vcpu::{Msr, MsrWrite, Task, Vcpu};
pub use verify::{Violation, verify};
