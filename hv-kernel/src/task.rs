//! A vCPU's task: one turn of it on a CPU, from load to put, and the guest loop's view of the
//! hypervisor meanwhile.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::mem;
use core::sync::atomic::{AtomicU32, Ordering};

use sld::{
    AcContext, MsrFault, MsrWrite, PerSecond, Policy, RealBit, SldMode, Task, Verdict, VmPolicy,
    Written,
};
use vmx::addr::{GuestPhysAddr, HostPhysAddr};
use vmx::apic::Ipi;
use vmx::checks::Finding;
use vmx::exit::BasicReason;
use vmx::instruction::now;
use vmx::mailbox::Mailbox;
use vmx::run::{Alone, End, Host, Poll, PortWrite, Stop};
use vmx::split_lock::{AcOutcome, AcReport};
use vmx::vcpu::{Counters as Exits, Vcpu};

use crate::counters::Counters;
use crate::devices::Devices;
use crate::events::{self, Event, Ring, Subject};
use crate::guest_memory::GuestMemory;
use crate::offenders::Offender;
use crate::percpu::{self, PerCpu};
use crate::sched::{Cpu, SldCpu};
use crate::vm::{Inspected, Reason, Vm};
use crate::x86::mca;
use crate::{console, memory};

/// How many warnings a run prints. Events and counters have all of them.
const MAX_WARNINGS: u32 = 100;

/// A vCPU that is loaded runs for so many ticks of the TSC, even if others are to be woken
/// meanwhile: it must get on, whatever came before.
const SHORTEST: u64 = 5_000;

/// Warnings that may still be printed.
static WARNINGS_LEFT: AtomicU32 = AtomicU32::new(MAX_WARNINGS);

/// A task that runs a vCPU. One CPU owns it at a time: it stands in that CPU's queue or among those
/// parked there, or is on its way in an inbox.
pub struct VcpuTask {
    /// Its vCPU; apart from the rest, since both are in use while it runs.
    vcpu: Box<Vcpu>,
    /// The rest.
    pub thread: Thread,
    region: HostPhysAddr,
}

/// A task without its vCPU.
pub struct Thread {
    /// Its VM.
    pub vm: Arc<Vm>,
    /// Its vCPU's index in the VM.
    pub index: u32,
    /// Its number among all vCPUs.
    pub id: u16,
    /// Split-lock detection's view of it: of that which its VM's split locks are detected by.
    pub sld: Task,
    /// That of the CPUs' own detection, if this is another one.
    aside: Option<Aside>,
    /// Its events that are not written out.
    ring: Ring,
    /// Its first split lock, of which people were not told yet.
    warning: Option<Warning>,
    /// What it has counted.
    pub counters: Counters,
    /// Its virtual time: the ticks that it was on a CPU, divided by its weight (100 is usual).
    pub vruntime: u64,
    /// How long it may still run, in ticks of the TSC.
    ticks_left: u64,
    /// When its guest executed HLT; `None` if it has not slept since.
    halted: Option<u64>,
    /// What its next turn is for.
    pub next: Next,
    /// The CPU where it ran last.
    last_cpu: Option<u32>,
    /// Its VMCS is active on the CPU that owns it.
    resident: bool,
    /// VM exits when it came to this CPU.
    pub exits_on_arrival: u64,
}

/// What people are told of a task's first split lock. They are told in the task's own turns: to write takes
/// long.
#[derive(Clone, Copy)]
struct Warning {
    rip: u64,
    cpl: u8,
    outcome: AcOutcome,
    cpu: u32,
}

/// What the task of a VM that is traced is to the CPUs' own detection.
struct Aside {
    policy: VmPolicy,
    task: Task,
}

/// What a task's next turn is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Its guest runs.
    Run,
    /// It sleeps, until this time at the latest (TSC): it has executed HLT, or waits until its VM's
    /// gate may be closed again.
    Sleep(Option<u64>),
    /// Another vCPU of its VM holds it out of the guest: it sleeps until that one lets it go on.
    Wait,
    /// Its VM is over.
    Retire,
}

impl VcpuTask {
    /// The task of the vCPU `index` of `vm`, which may run for `ticks`. `region` is its VMCS; `aside` is
    /// what its VM is to the CPUs' own detection, if it is traced.
    pub fn new(
        vm: Arc<Vm>,
        index: u32,
        id: u16,
        (vcpu, region): (Box<Vcpu>, HostPhysAddr),
        ticks: u64,
        aside: Option<VmPolicy>,
    ) -> Self {
        let policy = vm.policy();
        let number = u32::from(id) + 1;
        let thread = Thread {
            vm,
            index,
            id,
            sld: Task::of_vcpu(number, policy),
            aside: aside.map(|policy| Aside { policy, task: Task::of_vcpu(number, policy) }),
            ring: Ring::new(),
            warning: None,
            counters: Counters::new(),
            vruntime: 0,
            ticks_left: ticks,
            halted: None,
            next: Next::Run,
            last_cpu: None,
            resident: false,
            exits_on_arrival: 0,
        };
        Self { vcpu, thread, region }
    }

    /// Whether other CPUs may have it, too.
    pub fn is_movable(&self) -> bool {
        !self.thread.vm.placement.cpus.is_power_of_two()
    }

    /// VM exits so far.
    pub fn exits(&self) -> u64 {
        self.vcpu.counters.exits.iter().sum()
    }

    /// Writes the VMCS back to memory, so that another CPU may load it. False if that failed, which
    /// is the platform's fault; then it can run nowhere, and the caller ends the VM.
    ///
    /// # Safety
    ///
    /// On the CPU that owns the task, in VMX root operation; the vCPU is put.
    pub unsafe fn clear(&mut self) -> bool {
        // SAFETY: the caller's obligation; if it is active at all, it is so here.
        match if self.thread.resident { unsafe { self.vcpu.clear() } } else { Ok(()) } {
            Ok(()) => {
                self.thread.resident = false;
                true
            }
            Err(fail) => {
                log::error!("VMCLEAR of {}: {fail}", self.thread.vm.name);
                false
            }
        }
    }

    /// All that it has counted.
    pub fn counters(&self) -> Counters {
        let mut counters = self.thread.counters.clone();
        counters.exits = self.vcpu.counters.clone();
        counters
    }
}

impl Drop for VcpuTask {
    fn drop(&mut self) {
        // The CPU may still write to the region of a VMCS that could not be cleared.
        if !self.thread.resident {
            memory::free_frame(self.region);
        }
    }
}

impl Thread {
    /// Its VM's name and its index, for events.
    pub fn subject(&self) -> Subject {
        (self.vm.name, self.index)
    }

    /// Whether its VM is traced, if its policy wants that.
    #[inline]
    pub fn is_traced(&self) -> bool {
        self.aside.is_some()
    }

    /// The CPUs' own detection's view of it.
    #[inline]
    pub fn real_task(&self) -> &Task {
        self.aside.as_ref().map_or(&self.sld, |aside| &aside.task)
    }

    /// It has run, or waited for its timer, for so many ticks of what it may.
    fn charge(&mut self, ticks: u64) {
        // Without a limit there is nothing to count down.
        if self.ticks_left != u64::MAX {
            self.ticks_left = self.ticks_left.saturating_sub(ticks);
        }
    }

    /// Its next turn comes at this time, unless something wakes it before.
    fn sleep(&mut self, until: Option<u64>) {
        let now = now();
        // Without a timer, what it waits for is not its own time.
        self.halted = until.map(|_| now);
        let limit = now.saturating_add(self.ticks_left);
        self.next = Next::Sleep(until.map(|until| until.min(limit)));
    }

    /// It is `now`, and it has slept until then if it has slept.
    pub fn woken(&mut self, now: u64) {
        if let Some(since) = self.halted.take() {
            self.charge(now.saturating_sub(since));
        }
    }

    /// Records an event on `cpu`, which is this one.
    #[inline(always)]
    pub fn push(&mut self, cpu: &PerCpu, event: Event) {
        self.ring.push(cpu.stamp(), Some(self.subject()), event);
    }

    /// Whether its guest has to wait until some of its output is written.
    pub fn must_write(&self) -> bool {
        self.ring.is_over_half() || self.vm.devices.lock().is_full()
    }

    /// Whether all its output is written: at its end also where its guest split locks.
    #[inline]
    pub fn has_written(&self) -> bool {
        self.ring.is_empty()
            && self.warning.is_none()
            && !self.vm.has_lines()
            && (self.next != Next::Retire || self.ring.offenders.is_told())
    }

    /// Where its guest split locks, as far as its events are written.
    pub fn offenders(&self) -> &[Offender] {
        self.ring.offenders.places()
    }

    /// Writes an offender out, at its end.
    fn write_offender(&mut self) -> bool {
        let subject = self.subject();
        self.next == Next::Retire && self.ring.offenders.write_one(percpu::stamp, subject)
    }

    /// Tells people of a task's first split lock. All of them are counted, told or not.
    fn warn(&self, Warning { rip, cpl, outcome, cpu }: Warning) {
        let take = |left: u32| left.checked_sub(1);
        if WARNINGS_LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return;
        }
        let done = match outcome {
            AcOutcome::Step => "detection stays on, each one is stepped",
            AcOutcome::Emulate => "detection stays on, each one is emulated",
            AcOutcome::Throttle => "the VM has had as many as it may have, and waits",
            AcOutcome::Again => "it is to be executed again",
            _ => "detection is off for this task from now on",
        };
        let (vm, vcpu) = self.subject();
        log::warn!(
            "VM {vm}, vCPU {vcpu}: split lock at RIP {rip:#x}, CPL {cpl}, on CPU {cpu}: {done}"
        );
    }

    /// Writes events and its VM's output out until `ticks` have passed, one line at least if
    /// nobody else is writing.
    pub fn write_output(&mut self, ticks: u64) {
        let start = now();
        if let Some(warning) = self.warning.take() {
            self.warn(warning);
        }
        loop {
            // The console first: a line that is taken out is printed.
            let printed = console::try_with(|console| self.vm.print_line(console));
            let progress = self.ring.write_one() || printed == Some(true) || self.write_offender();
            if !progress || now().wrapping_sub(start) >= ticks {
                return;
            }
        }
    }
}

impl Cpu {
    /// The guest's part of a turn: load, run for `ticks` at most, put. It goes on while nobody
    /// else waits for the CPU. What is to happen next is in the task.
    pub fn run_guest(&mut self, task: &mut VcpuTask, ticks: u64) {
        let cpu = self.shared;
        let VcpuTask { vcpu, thread, .. } = task;
        let vm = thread.vm.clone();
        let slot = &vm.vcpus[thread.index as usize];
        slot.whereabouts.set_running(cpu.index);
        if !vm.gate.enter(thread.index) {
            slot.whereabouts.set_queued();
            thread.next = Next::Wait;
            return;
        }
        self.enter_core();
        vm.used_by(cpu.bit());
        self.switch_to(Some(thread));
        thread.counters.loads += 1;
        self.count_load();
        if thread.last_cpu.replace(cpu.index).is_some_and(|last| last != cpu.index) {
            thread.counters.migrations += 1;
        }
        // Also if the load fails half way.
        thread.resident = true;
        // SAFETY: interrupts are off; the vCPU is put below, before this CPU does anything else,
        // and no other CPU has the task; `host` describes this CPU.
        let stop = match unsafe { vcpu.load(&self.host) } {
            Err(fail) => {
                vm.gate.leave(thread.index);
                Stop::End(End::EntryFailed(fail))
            }
            Ok(mut loaded) => {
                let mut stop = Stop::End(End::PlatformFault);
                let (pinned, task) = self.detection_of(thread);
                let written = loaded.load_sld(pinned, task);
                let mut running = Running { cpu: self, thread, in_gate: true, fresh: true };
                running.note_own(written);
                running.verify("load");
                running.record_turn(|disabled| Event::Load { disabled });
                // A faulting MSR 0x33 would leave the guest with a detection that it did not ask
                // for.
                while written.is_ok() {
                    let start = now();
                    let slice = ticks.min(running.thread.ticks_left);
                    let due = running.cpu.ticks_to_deadline(start);
                    let due = due.min(running.cpu.ticks_to_operator(start));
                    let slice = slice.min(due.max(SHORTEST));
                    stop = loaded.run(&mut running, slice);
                    let used = now().wrapping_sub(start);
                    running.thread.charge(used);
                    let goes_on = stop == Stop::Slice
                        && running.in_gate
                        && running.cpu.is_idle_otherwise()
                        && !running.cpu.is_operator_waiting()
                        && running.thread.ticks_left != 0
                        && running.thread.has_written();
                    if !goes_on {
                        break;
                    }
                    running.cpu.publish(running.thread, used);
                }
                running.record_turn(|disabled| Event::Put { disabled });
                let Running { cpu, thread, in_gate, .. } = running;
                let (pinned, task) = cpu.detection_of(thread);
                let written = loaded.put_sld(pinned, task);
                loaded.put();
                let mut running = Running { cpu, thread, in_gate, fresh: false };
                running.note_own(written);
                running.verify("put");
                if running.in_gate {
                    vm.gate.leave(running.thread.index);
                }
                if written.is_err() { Stop::End(End::PlatformFault) } else { stop }
            }
        };
        self.leave_core();
        slot.whereabouts.set_queued();
        self.after(thread, stop);
    }

    /// What the split locks of this task's VM are detected by, and the task's part in that.
    #[inline(always)]
    fn detection_of<'a>(&'a mut self, thread: &'a mut Thread) -> (&'a mut SldCpu, &'a mut Task) {
        let pinned = if thread.is_traced() { &mut self.tracer } else { &mut self.sld };
        (pinned, &mut thread.sld)
    }

    /// What the guest loop returned decides what the task's next turn is for.
    fn after(&mut self, thread: &mut Thread, stop: Stop) {
        let reason = match stop {
            Stop::Slice | Stop::Halt(Some(_)) | Stop::Held if thread.ticks_left == 0 => {
                Reason::TimeLimit
            }
            // Held or not: its next turn asks the gate.
            Stop::Slice | Stop::Held => return,
            Stop::Halt(until) => {
                thread.sleep(until);
                return;
            }
            Stop::Over => {
                thread.next = Next::Retire;
                return;
            }
            Stop::End(end) => Reason::End(end),
        };
        thread.next = Next::Retire;
        self.end_vm(&thread.vm, reason);
    }
}

/// A task on a CPU: the `vmx` crate's view of the hypervisor.
struct Running<'a> {
    cpu: &'a mut Cpu,
    thread: &'a mut Thread,
    /// It is inside its VM's gate.
    in_gate: bool,
    /// Its guest has not run in this turn.
    fresh: bool,
}

impl Running<'_> {
    /// Records what an operation of `sld` did to the real bit: mostly nothing.
    #[inline(always)]
    fn note(&mut self, written: Written) {
        if written != Ok(None) {
            self.note_write(written);
        }
    }

    #[inline(never)]
    fn note_write(&mut self, written: Written) {
        match written {
            Ok(None) => {}
            Ok(Some(real_bit)) => {
                self.thread.counters.real_bit_writes += 1;
                self.thread.push(self.cpu.shared, Event::RealBit(real_bit));
            }
            Err(fault) => log::error!("CPU {}: MSR 0x33: {fault}", self.cpu.shared.index),
        }
    }

    /// Records what an operation of `sld` did to the bit that this VM's split locks are detected by.
    #[inline(always)]
    fn note_own(&mut self, written: Written) {
        if written != Ok(None) {
            self.note_own_write(written);
        }
    }

    #[inline(never)]
    fn note_own_write(&mut self, written: Written) {
        match written {
            Ok(Some(bit)) if self.thread.is_traced() => {
                self.thread.push(self.cpu.shared, Event::TraceBit(bit));
            }
            written => self.note_write(written),
        }
    }

    fn verify(&mut self, when: &str) {
        self.cpu.verify(when, Some(self.thread));
    }

    /// Records where the guest begins or ends to run, if that is wished.
    #[inline(always)]
    fn record_turn(&mut self, event: impl FnOnce(bool) -> Event) {
        if self.cpu.policy.schedule_events {
            let event = event(self.thread.sld.is_disabled());
            self.thread.push(self.cpu.shared, event);
        }
    }

    /// Waits until the VM's other vCPUs are out of the guest. This vCPU holds the gate.
    fn wait_for_vm(&mut self, others: u16) {
        let vm = &self.thread.vm;
        let indices = (0..).zip(&vm.vcpus).filter(|(index, _)| others & 1 << index != 0);
        indices.for_each(|(_, slot)| self.cpu.deliver(vm, slot));
        // Who waits is in nobody's way: a sibling that is to run alone finds this thread outside.
        self.cpu.leave_core();
        while !vm.gate.is_alone(self.thread.index) {
            core::hint::spin_loop();
        }
        self.cpu.enter_core();
    }
}

impl Host for Running<'_> {
    type Pinned = SldCpu;
    type Memory = GuestMemory;

    fn sld(&mut self) -> (&mut SldCpu, &mut Task) {
        self.cpu.detection_of(self.thread)
    }

    #[inline(always)]
    fn traces(&self) -> bool {
        self.thread.is_traced() && self.cpu.tracer.traces()
    }

    #[inline(always)]
    fn is_aside(&self) -> bool {
        self.thread.is_traced()
    }

    #[cold]
    #[inline(never)]
    fn real_ac(&mut self, context: AcContext) -> Result<Verdict, MsrFault> {
        match &mut self.thread.aside {
            // Its guest has no say here, and nothing is kept from one #AC to the next.
            Some(Aside { policy, task }) => {
                sld::Vcpu::new(*policy).on_ac(&mut self.cpu.sld, task, context)
            }
            None => Ok(Verdict::Inject),
        }
    }

    fn memory(&self) -> &GuestMemory {
        &self.thread.vm.memory
    }

    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        // A port that nobody owns reads as all ones.
        if Devices::own(port) { self.thread.vm.port_read(port, size) } else { u32::MAX }
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) -> PortWrite {
        if Devices::own(port) {
            self.thread.vm.port_write(port, size, value)
        } else {
            PortWrite::Done
        }
    }

    fn mailbox(&self) -> &Mailbox {
        &self.thread.vm.vcpus[self.thread.index as usize].mailbox
    }

    fn send(&mut self, ipi: Ipi, sender: u32) {
        let vm = &self.thread.vm;
        let reached = |index| index != sender && ipi.reaches(index, sender);
        for (_, slot) in (0..).zip(&vm.vcpus).filter(|(index, _)| reached(*index)) {
            slot.mailbox.post(ipi.delivery());
            self.cpu.deliver(vm, slot);
        }
    }

    fn poll(&mut self) -> Poll {
        // A sibling that steps has this thread out for one instruction.
        if self.cpu.shared.core.gate.wants_out(self.cpu.shared.thread) {
            self.cpu.leave_core();
            self.cpu.enter_core();
        }
        if self.thread.vm.gate.wants_out(self.thread.index) {
            return Poll::Held;
        }
        self.cpu.receive();
        self.cpu.share();
        let fresh = mem::replace(&mut self.fresh, false);
        match self.cpu.is_wanted_before(self.thread) {
            false => Poll::GoOn,
            // A vCPU that is loaded gets on.
            true if fresh => Poll::YieldIn(SHORTEST),
            true => Poll::Yield,
        }
    }

    fn map_hole(&mut self, gpa: GuestPhysAddr) -> Alone {
        let vm = self.thread.vm.clone();
        let first = !vm.gate.is_held_by(self.thread.index);
        if first {
            if let Some(until) = vm.quiet_until(now()) {
                self.thread.next = Next::Sleep(Some(until));
                return Alone::Held;
            }
            match self.stop_vm() {
                Alone::Yes => {}
                other => return other,
            }
        }
        if vm.map_hole(gpa) {
            return Alone::Yes;
        }
        // With others mapped before, the guest loop calls it.
        if first {
            self.unmap_holes();
        }
        Alone::Refused
    }

    fn unmap_holes(&mut self) {
        self.thread.vm.unmap_holes();
        self.thread.vm.keep_quiet(now());
        self.release_vm();
    }

    fn stop_vm(&mut self) -> Alone {
        match self.thread.vm.gate.close(self.thread.index) {
            None => return Alone::Held,
            Some(0) => {}
            Some(others) => self.wait_for_vm(others),
        }
        Alone::Yes
    }

    fn release_vm(&mut self) {
        let vm = &self.thread.vm;
        let held = vm.gate.open(self.thread.index);
        for (_, slot) in (0..).zip(&vm.vcpus).filter(|(index, _)| held & 1 << index != 0) {
            slot.mailbox.post_gate();
            self.cpu.deliver(vm, slot);
        }
    }

    fn may_split(&mut self, limit: PerSecond) -> bool {
        match self.thread.vm.may_split(now(), limit) {
            Ok(()) => true,
            Err(until) => {
                self.thread.sleep(Some(until));
                false
            }
        }
    }

    fn begin_step(&mut self) -> Result<Alone, MsrFault> {
        let cpu = self.cpu.shared;
        // Nothing is to be switched off.
        if self.cpu.sld.mode() == SldMode::Off {
            return Ok(Alone::Yes);
        }
        let vm = self.thread.vm.clone();
        let me = self.thread.index;
        let Some(siblings) = cpu.core.gate.close(cpu.thread) else {
            self.cpu.leave_core();
            self.cpu.enter_core();
            return Ok(Alone::Again);
        };
        if siblings != 0 {
            self.cpu.kick_siblings(siblings);
            // Who waits is in nobody's way, unless others wait for it anyway.
            let holds = vm.gate.is_held_by(me);
            if !holds {
                vm.gate.leave(me);
                self.in_gate = false;
            }
            while !cpu.core.gate.is_alone(cpu.thread) {
                core::hint::spin_loop();
            }
            if !holds {
                self.in_gate = vm.gate.enter(me);
                if !self.in_gate {
                    let _ = cpu.core.gate.open(cpu.thread);
                    return Ok(Alone::Held);
                }
            }
        }
        let written = sld::step_begin(&mut self.cpu.sld);
        self.note(written);
        if let Err(fault) = written {
            let _ = cpu.core.gate.open(cpu.thread);
            return Err(fault);
        }
        Ok(Alone::Yes)
    }

    fn end_step(&mut self) -> Result<(), MsrFault> {
        if self.cpu.sld.mode() == SldMode::Off {
            return Ok(());
        }
        let written = sld::step_end(&mut self.cpu.sld);
        self.note(written);
        // Those that were held look again and again: nobody is to be woken.
        let _ = self.cpu.shared.core.gate.open(self.cpu.shared.thread);
        written.map(drop)
    }

    fn policy(&self) -> Policy {
        self.thread.vm.policy().policy()
    }

    #[cold]
    #[inline(never)]
    fn on_policy(&mut self, policy: Policy) {
        let (name, index) = self.thread.subject();
        // At once, other than what a guest brings about: an operator does not do it often.
        events::write(self.cpu.shared.stamp(), "policy", |json| {
            json.text("vm", name)?;
            json.number("vcpu", index)?;
            json.text("policy", policy)
        });
        self.thread.vm.policy_taken(self.thread.index, policy);
    }

    #[cold]
    #[inline(never)]
    fn on_inspect(&mut self, exits: &Exits) {
        let counters = Counters { exits: exits.clone(), ..self.thread.counters.clone() };
        let slot = &self.thread.vm.vcpus[self.thread.index as usize];
        let cpu = self.cpu.shared.index;
        *slot.inspected.lock() = Some(Inspected { cpu, counters });
    }

    #[inline(always)]
    fn on_ac(&mut self, report: &AcReport) {
        self.thread.counters.split_locks.count(report.outcome, report.context.legacy());
        self.thread.push(self.cpu.shared, Event::Ac(*report));
        if report.first {
            let AcReport { rip, context, outcome, .. } = *report;
            let cpu = self.cpu.shared.index;
            self.thread.warning = Some(Warning { rip, cpl: context.cpl, outcome, cpu });
        }
    }

    #[inline(always)]
    fn on_test_ctrl_write(&mut self, value: u64, result: MsrWrite) {
        self.thread.push(self.cpu.shared, Event::TestCtrlWrite { value, result });
    }

    fn on_real_bit(&mut self, written: RealBit) {
        self.note_own(Ok(Some(written)));
    }

    #[inline(always)]
    fn is_full(&self) -> bool {
        self.thread.ring.is_nearly_full()
    }

    #[inline(always)]
    fn on_exit(&mut self, reason: BasicReason, rip: u64) {
        self.cpu.shared.trail.push(reason, rip);
    }

    fn on_invalid_state(&mut self, finding: &Finding<'_>) {
        log::error!("VM {}: VM entry refused its state: {finding}", self.thread.vm.name);
    }

    fn nmi(&mut self) {
        crate::x86::exceptions::on_nmi();
        crate::x86::exceptions::unblock_nmis();
    }

    fn interrupt(&mut self, vector: u8) {
        self.cpu.interrupt(vector);
    }

    fn machine_check(&mut self) -> bool {
        mca::in_guest(self.cpu.shared, self.thread.vm.name)
    }
}
