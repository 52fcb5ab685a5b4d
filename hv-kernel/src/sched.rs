//! Which vCPU runs: each VM's in turn, a time slice each.
//!
//! A vCPU is loaded when its task is scheduled in and put when it is scheduled out, not at every
//! entry. With nobody else waiting, it stays where it is.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use core::fmt;

use sld::{MsrWrite, PreemptionDisabled, RealBit, Task, ThisCpu, Verdict, Written};
use vmx::addr::GuestPhysAddr;
use vmx::checks::Finding;
use vmx::exit::BasicReason;
use vmx::instruction::now;
use vmx::run::{AcReport, End, Host, Stop};
use vmx::vcpu::{Counters, HostState};

use crate::events::{Event, Object, Ring};
use crate::guest_memory::GuestMemory;
use crate::trail::Trail;
use crate::vm::{Guest, SplitLocks, Vm};
use crate::x86::msr::TestCtrlMsr;

/// This CPU's split-lock detection.
pub struct SldCpu {
    cpu: sld::Cpu,
    core: sld::Core,
    hardware: TestCtrlMsr,
}

/// The hypervisor runs with interrupts off and switches tasks only where this module says so:
/// whoever holds the CPU's data is neither preempted nor migrated.
impl PreemptionDisabled for SldCpu {
    type Hardware = TestCtrlMsr;

    fn this_cpu(&mut self) -> ThisCpu<'_, TestCtrlMsr> {
        ThisCpu { cpu: &mut self.cpu, core: &self.core, hardware: &mut self.hardware }
    }
}

impl SldCpu {
    /// A CPU that is not online.
    pub const fn new() -> Self {
        Self { cpu: sld::Cpu::new(), core: sld::Core::new(), hardware: TestCtrlMsr }
    }

    /// The mode that this CPU enforces.
    pub const fn mode(&self) -> sld::SldMode {
        self.cpu.mode()
    }
}

/// What the scheduler keeps for one CPU.
pub struct Cpu {
    /// Its index.
    pub index: u32,
    /// Split-lock detection.
    pub sld: SldCpu,
    /// Events that wait to be written.
    pub events: Ring,
    /// The last exits.
    pub trail: &'static Trail,
    /// What VM exits load.
    pub host: HostState,
    /// Warnings that may still be printed; events and counters have all of them.
    pub warnings_left: u32,
}

/// A VM that waits for its turn.
struct Waiting {
    vm: Box<Vm>,
    /// Not before this time, in the TSC.
    until: u64,
    /// When its guest executed HLT; `None` if it has only had its turn.
    halted: Option<u64>,
}

/// Who is next, if not the first: one who is ready, or else, of those who only wait because they
/// took too much, the one who has waited longest.
fn next_ready(queue: &VecDeque<Waiting>, time: u64) -> Option<usize> {
    let ready = queue.iter().position(|waiting| waiting.until <= time);
    ready.or_else(|| {
        let running = queue.iter().enumerate().filter(|(_, waiting)| waiting.halted.is_none());
        running.min_by_key(|(_, waiting)| waiting.until).map(|(index, _)| index)
    })
}

/// How a turn came to its end.
enum Turn {
    /// The slice is used up, and so many ticks more: output of what it caused takes its time.
    Over(u64),
    /// The guest waits for its timer until this time, in the TSC.
    Halted(u64),
    /// The VM is over.
    Ended(Reason),
}

/// Why a VM is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    /// The guest loop has ended it.
    End(End),
    /// HLT, and nothing could ever wake it.
    Halt,
    /// Its `limit_ticks` are used up.
    TimeLimit,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End(end) => end.fmt(f),
            Self::Halt => f.write_str("halt"),
            Self::TimeLimit => f.write_str("time limit"),
        }
    }
}

/// How many warnings a run prints.
pub const MAX_WARNINGS: u32 = 100;

/// Counters of the VMs that have ended.
#[derive(Default)]
pub struct Totals {
    /// VMs.
    pub vms: u64,
    /// VM exits.
    pub exits: u64,
    /// Split locks by verdict.
    pub split_locks: SplitLocks,
}

impl Cpu {
    /// Records what an operation of `sld` did to the real bit.
    #[inline(always)]
    pub fn note(&mut self, vm: Option<&'static str>, written: Written) {
        match written {
            Ok(None) => {}
            Ok(Some(real_bit)) => self.events.push(vm, Event::RealBit(real_bit)),
            Err(fault) => log::error!("CPU {}: MSR 0x33: {fault}", self.index),
        }
    }

    /// From now on this CPU runs `task`, that of `vm` or the idle one.
    #[inline]
    fn switch_to(&mut self, task: &Task, vm: Option<&'static str>) {
        let written = sld::task_switch(&mut self.sld, task);
        self.note(vm, written);
    }

    /// Runs all VMs to their ends.
    pub fn run(&mut self, vms: impl Iterator<Item = Vm>, slice_ticks: u64) -> Totals {
        let idle = Task::new(0);
        let mut queue: VecDeque<_> =
            vms.map(|vm| Waiting { vm: Box::new(vm), until: 0, halted: None }).collect();
        let mut totals = Totals::default();
        loop {
            let time = now();
            // As a rule the first one is ready.
            if queue.front().is_some_and(|first| first.until > time) {
                match next_ready(&queue, time) {
                    Some(index) => queue.rotate_left(index),
                    None => {
                        // All are halted: their timers will wake them.
                        self.switch_to(&idle, None);
                        self.events.drain();
                        core::hint::spin_loop();
                        continue;
                    }
                }
            }
            let Some(Waiting { mut vm, halted, .. }) = queue.pop_front() else { break };
            if let Some(since) = halted {
                vm.guest.charge(time.saturating_sub(since));
            }
            match self.turn(&mut vm, slice_ticks, queue.is_empty()) {
                // Who took more than its slice lets the others have as much first.
                Turn::Over(excess) => {
                    let until = now().saturating_add(excess);
                    queue.push_back(Waiting { vm, until, halted: None });
                }
                Turn::Halted(until) => {
                    let halted = now();
                    let until = until.min(halted.saturating_add(vm.guest.ticks_left));
                    queue.push_back(Waiting { vm, until, halted: Some(halted) });
                }
                Turn::Ended(reason) => {
                    self.switch_to(&idle, None);
                    self.end(vm, reason, &mut totals);
                }
            }
        }
        totals
    }

    /// One turn of a VM: a slice, or as many as it likes if it is alone.
    fn turn(&mut self, vm: &mut Vm, slice_ticks: u64, alone: bool) -> Turn {
        self.switch_to(&vm.guest.task, Some(vm.guest.name));
        // SAFETY: interrupts are off, this is the only CPU, `turn` puts the vCPU before it
        // returns, and `host` describes this CPU.
        let mut loaded = match unsafe { vm.vcpu.load(&self.host) } {
            Ok(loaded) => loaded,
            Err(fail) => return Turn::Ended(Reason::End(End::EntryFailed(fail))),
        };
        let loads = loaded.load_sld(&mut self.sld, &mut vm.guest.task);
        let mut running = Running { cpu: self, guest: &mut vm.guest };
        running.note(loads);
        // How much longer than a slice it took.
        let mut excess = 0;
        // A faulting MSR 0x33 would leave the guest with a detection that it did not ask for.
        let mut stop = Stop::End(End::PlatformFault);
        while loads.is_ok() {
            let start = now();
            let slice = slice_ticks.min(running.guest.ticks_left);
            stop = loaded.run(&mut running, slice);
            running.cpu.events.drain();
            let used = now().wrapping_sub(start);
            excess = used.saturating_sub(slice_ticks);
            running.guest.charge(used);
            if stop != Stop::Slice || !alone || running.guest.ticks_left == 0 {
                break;
            }
        }
        let Running { cpu, guest } = running;
        let puts = loaded.put_sld(&mut cpu.sld, &mut guest.task);
        loaded.put();
        Running { cpu, guest }.note(puts);
        match stop {
            Stop::Slice | Stop::Halt(Some(_)) if vm.guest.ticks_left == 0 => {
                Turn::Ended(Reason::TimeLimit)
            }
            Stop::Slice | Stop::Halt(_) if puts.is_err() => {
                Turn::Ended(Reason::End(End::PlatformFault))
            }
            Stop::Slice => Turn::Over(excess),
            Stop::Halt(Some(until)) => Turn::Halted(until),
            Stop::Halt(None) => Turn::Ended(Reason::Halt),
            Stop::End(end) => Turn::Ended(Reason::End(end)),
        }
    }

    fn end(&mut self, mut vm: Box<Vm>, reason: Reason, totals: &mut Totals) {
        vm.guest.devices.flush();
        let Guest { name, split_locks, real_bit_writes, .. } = vm.guest;
        match reason {
            Reason::End(End::Exit(status)) => {
                log::info!("VM {name} ended itself with status {status}")
            }
            Reason::End(End::SplitLock) => log::error!(
                "VM {name} is stopped: split lock, and the policy is fatal. The others go on"
            ),
            Reason::End(End::BogusAc) => log::error!(
                "VM {name} is stopped: #AC although split-lock detection is off. The CPU or the \
                 firmware misbehaves"
            ),
            other => log::warn!("VM {name} has ended: {other}"),
        }
        let counters = &vm.vcpu.counters;
        let status = if let Reason::End(End::Exit(status)) = reason { Some(status) } else { None };
        self.events.write("vm-end", |json| {
            json.text("vm", name)?;
            json.text("reason", reason)?;
            if let Some(status) = status {
                json.number("status", status)?;
            }
            json.object("counters", |json| {
                json.object("exits", |json| write_exits(json, counters))?;
                json.object("split_locks", |json| split_locks.write(json))?;
                json.number("real_bit_writes", real_bit_writes)
            })
        });
        totals.vms += 1;
        totals.exits += counters.exits().map(|row| row.1).sum::<u64>();
        totals.split_locks.add(&split_locks);
        // SAFETY: `turn` has put the vCPU, on this CPU.
        unsafe { vm.destroy() };
    }
}

fn write_exits(json: &mut Object<'_>, counters: &Counters) -> fmt::Result {
    counters.exits().try_for_each(|(reason, count)| match reason.name() {
        Some(name) => json.number(name, count),
        None => json.number("other", count),
    })
}

/// A guest on a CPU: the `vmx` crate's view of the hypervisor.
struct Running<'a> {
    cpu: &'a mut Cpu,
    guest: &'a mut Guest,
}

impl Running<'_> {
    /// Tells people of a task's first split lock. All of them are counted, told or not.
    #[cold]
    fn warn(&mut self, report: &AcReport) {
        let Some(left) = self.cpu.warnings_left.checked_sub(1) else { return };
        self.cpu.warnings_left = left;
        log::warn!(
            "VM {}, vCPU 0: split lock at RIP {:#x}, CPL {}, on CPU {}: detection is off for this \
             task from now on",
            self.guest.name,
            report.rip,
            report.context.cpl,
            self.cpu.index
        );
    }

    fn note(&mut self, written: Written) {
        if let Ok(Some(_)) = written {
            self.guest.real_bit_writes += 1;
        }
        self.cpu.note(Some(self.guest.name), written);
    }
}

impl Host for Running<'_> {
    type Pinned = SldCpu;
    type Memory = GuestMemory;

    fn sld(&mut self) -> (&mut SldCpu, &mut Task) {
        (&mut self.cpu.sld, &mut self.guest.task)
    }

    fn memory(&self) -> &GuestMemory {
        &self.guest.memory
    }

    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        self.guest.devices.port_read(port, size)
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) -> Option<u32> {
        self.guest.devices.port_write(port, size, value)
    }

    fn map_hole(&mut self, gpa: GuestPhysAddr) -> bool {
        self.guest.map_hole(gpa)
    }

    fn unmap_holes(&mut self) {
        self.guest.unmap_holes();
    }

    #[inline(always)]
    fn on_ac(&mut self, report: &AcReport) {
        self.guest.count(report.verdict);
        self.cpu.events.push(Some(self.guest.name), Event::Ac(*report));
        if let Verdict::Warn { first: true, .. } = report.verdict {
            self.warn(report);
        }
    }

    #[inline(always)]
    fn on_test_ctrl_write(&mut self, value: u64, result: MsrWrite) {
        self.cpu.events.push(Some(self.guest.name), Event::TestCtrlWrite { value, result });
    }

    fn on_real_bit(&mut self, written: RealBit) {
        self.note(Ok(Some(written)));
    }

    #[inline(always)]
    fn on_exit(&mut self, reason: BasicReason, rip: u64) {
        self.cpu.trail.push(reason, rip);
    }

    fn on_invalid_state(&mut self, finding: &Finding<'_>) {
        log::error!("VM {}: VM entry refused its state: {finding}", self.guest.name);
    }

    fn nmi(&mut self) {
        log::warn!("NMI on CPU {} while VM {} ran", self.cpu.index, self.guest.name);
    }

    fn interrupt(&mut self, vector: u8) {
        log::warn!("interrupt {vector} on CPU {}: no device is set up for any", self.cpu.index);
    }

    fn machine_check(&mut self) {
        panic!("machine check on CPU {} while VM {} ran", self.cpu.index, self.guest.name);
    }
}
