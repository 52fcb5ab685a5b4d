//! Split-lock detection for hypervisors: the policy, the guest's MSR and the verdict on #AC, with
//! the hardware behind one small trait.
//!
//! A split lock is a locked access that crosses a cache line. It takes the bus lock, for thousands
//! of cycles that every core feels. CPUs since Ice Lake raise #AC instead while bit 29 of
//! MSR_TEST_CTRL (0x33) is set. Both the host and its guests have a use for that bit, and there is
//! one per core. This crate decides its value, always, and nobody else does:
//!
//! * **[`Policy`]**: what is done about the split locks of a VM, each VM's own ([`VmPolicy`]), and
//!   another one at any time. **[`SldMode`]**: what the host does with the bit, which follows from
//!   the policy that is its default.
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
//! | may a [`Verdict::Throttle`] be carried out now? | [`RateLimiter::allow`] | if not, when |
//! | the host gives a VM another policy | [`Vcpu::set_policy`] | [`Written`], or why not |
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
//!    [`Task`] per thread ([`Task::new`] for idle ones, [`Task::of_vcpu`]), a [`Vcpu`] per vCPU.
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
//!     AcContext, Core, Cpu, Host, Msr, MsrFault, MsrWrite, Policy, PreemptionDisabled, RealBit,
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
//! let policy: Policy = "warn".parse()?;
//! assert_eq!(online(&mut guard, policy.mode()).real_bit, Some(RealBit { on: true, why: Why::Boot }));
//! let host = Host { configured: policy, enforced: guard.cpu.mode() };
//!
//! // A guest that is told of the feature: out of reset its bit is clear, and so is the real one.
//! let mut aware = Vcpu::new(VmPolicy::new(host, None, true)?);
//! let mut its_task = Task::of_vcpu(1, aware.vm());
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
//! let mut another = Task::of_vcpu(2, unaware.vm());
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
//! # Without the hardware
//!
//! [`SoftwareTestCtrl`] is a 0x33 for hypervisors that look at each instruction of a guest before it
//! is executed, where the CPU has none ([`Source`]): the same crate, with a second [`Cpu`], [`Core`]
//! and [`Task`], decides when to look and what a split lock comes to.
//!
//! # Policies
//!
//! A guest that has set its own bit 29 is delivered its #AC, whatever the policy, and so is one
//! that has asked for alignment checks. What happens at all other split locks:
//!
//! | policy | the real bit, while the VM runs | the instruction | host |
//! |---|---|---|---|
//! | `off` | off | executes, unseen | off, warn |
//! | `warn` | on until the task's first one | executes; the first is seen | warn |
//! | `step` | on, but for the instruction | executes, each is seen | warn |
//! | `ratelimit=N` | on, but for the instruction | as `step`, N a second at most | warn |
//! | `emulate` | on | is done in software: the bus is not locked | warn, fatal |
//! | `fatal` | on | does not execute, the VM ends | warn, fatal |
//!
//! With `off` and `warn`, the bit follows the wish of a guest that is told of the feature.
//!
//! The host's mode is [`Policy::mode`] of its default: `off` and `fatal` as they are, `warn` of all
//! others. Only a fatal host can promise that no bus lock is taken at all: in one that warns, other
//! VMs may have other policies, and what cannot be emulated is stepped ([`Fallback`]).
//!
//! # SMT
//!
//! While siblings are online, the bit is off only if all of them run tasks that have it disabled.
//! A guest whose wish to have it off is not granted, or whose VM is `off` in vain, gets
//! [`Verdict::Step`] for its split locks.
//!
//! # A step
//!
//! To carry [`Verdict::Step`] out:
//!
//! 1. Hold the core's other threads, if any, out of their guests, and wait until they are. Threads
//!    that want to step wait for each other here: one of a core at a time.
//! 2. [`step_begin`]: the bit is off, whatever the siblings' hypervisor code does meanwhile.
//! 3. Enter the guest with the monitor-trap flag set, for one instruction. Nothing is injected but
//!    an event whose delivery the #AC interrupted: that delivery then is what is stepped.
//! 4. At the exit, whichever it is, [`step_end`] before anything else: the bit is again what the
//!    threads want.
//! 5. Let the siblings go.
//!
//! A hypervisor that cannot single-step must run one thread per core, and do without the policies
//! that need it.
//!
//! # How it is checked
//!
//! `src/check` explores every order of all operations in small systems (one and two CPUs, one core
//! or two, every mode, pairs of VMs that are given any policy at any time, preemption and migration
//! between any two steps, hardware that lacks the bit or fails, steps with a sibling doing anything
//! meanwhile) against a separate model of the hardware, and the invariants of its `system.rs` must
//! hold in every state; random long sequences do the same for systems of four CPUs. [`verify`] must
//! agree in each, and must notice when one is damaged. `tests/mutants.rs` seeds faults into this
//! source, and all must be found. `tests/verdicts.csv` is the verdict table expanded to every input.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod ac;
#[cfg(test)]
mod check;
mod cpu;
mod hardware;
mod mode;
mod policy;
mod rate;
mod smt;
mod software;
mod source;
mod vcpu;
mod verify;

pub use ac::{AcContext, Fallback, Verdict};
pub use cpu::{Cpu, Detection, Online, ProbeFailure, RealBit, Why, Written};
pub use cpu::{offline, online, step_begin, step_end, task_switch};
pub use hardware::{
    CORE_CAPABILITIES_SPLIT_LOCK, CPUID_CORE_CAPABILITIES, MSR_CORE_CAPABILITIES, MSR_TEST_CTRL,
    MsrFault, PreemptionDisabled, TEST_CTRL_SPLIT_LOCK, TestCtrl, ThisCpu,
};
pub use mode::{Host, PolicyError, SldMode, VmPolicy};
pub use policy::{PerSecond, Policy, UnknownPolicy};
pub use rate::RateLimiter;
pub use smt::Core;
pub use software::SoftwareTestCtrl;
pub use source::{Source, UnknownSource};
pub use vcpu::{Msr, MsrWrite, Task, Vcpu};
pub use verify::{Violation, verify};
