//! Which vCPU runs where: each CPU's own queue, by weighted virtual time.
//!
//! A CPU touches nobody's queue but its own. What others have for it, a vCPU to run or one of its
//! parked ones to wake, they put into its inbox ([`crate::inbox`]) and kick it by NMI. A CPU without
//! work says so in [`IDLE`]; one with more than it can run gives it some, and evens out with the
//! others one by one. What it gives away it has cleared before: a VMCS is active on its owner only.
//!
//! A vCPU is loaded when its task is scheduled in and put when it is scheduled out, not at every
//! entry. With nobody else waiting, it stays where it is.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use sld::{
    MsrFault, PreemptionDisabled, RealBit, SoftwareTestCtrl, Task, TestCtrl, ThisCpu, Violation,
    Written,
};
use spin::Mutex;
use vmx::instruction::now;
use vmx::run::End;
use vmx::vcpu::HostState;

use crate::console;
use crate::counters::Counters;
use crate::deadlines::Deadlines;
use crate::events::{self, Event, Ring};
use crate::fleet::{self, Last, Place};
use crate::inbox::Message;
use crate::operator::Operator;
use crate::percpu::{self, Core, PerCpu};
use crate::platform;
use crate::runqueue::RunQueue;
use crate::screen::Colour;
use crate::summary;
use crate::task::{Next, Thread, VcpuTask};
use crate::vm::{MAX_VCPUS, Reason, Slot, Vm};
use crate::x86::apic::{LocalApic, SPURIOUS_VECTOR, TIMER_VECTOR};
use crate::x86::idle;
use crate::x86::msr::TestCtrlMsr;

/// CPUs that sleep or are about to.
static IDLE: AtomicU64 = AtomicU64::new(0);
/// VMs that are not over and done with, and what else keeps the run open: [`hold`].
static VMS_LEFT: AtomicU32 = AtomicU32::new(0);
/// All loads, where they are limited.
static LOADS: AtomicU64 = AtomicU64::new(0);
/// Invariants that did not hold.
static VIOLATIONS: AtomicU64 = AtomicU64::new(0);
/// What the VMs that are done with have counted, and how many they were.
static TOTALS: Mutex<(Counters, u64)> = Mutex::new((Counters::new(), 0));
/// All VMs are done with: the CPUs leave [`Cpu::run`].
static DONE: AtomicBool = AtomicBool::new(false);

/// The weight that changes nothing.
const USUAL_WEIGHT: u64 = 100;
/// How many slices a task may be ahead or behind when it comes to a CPU.
const MAX_LAG_SLICES: u64 = 3;
/// What a wake-up costs others, in ticks of the TSC: a kick, and two switches. Whoever is woken
/// pays for it in virtual time, so that vCPUs which wake each other all the time do not live on
/// the time of those whom they interrupt.
const WAKE_TICKS: u64 = 5_000;

/// A CPU's split-lock detection: its own, or the software's that stands for it.
pub struct SldCpu {
    cpu: sld::Cpu,
    core: &'static sld::Core,
    hardware: Hardware,
}

/// What has bit 29 of 0x33.
pub enum Hardware {
    /// The CPU.
    Msr(TestCtrlMsr),
    /// Who traces the guest.
    Software(SoftwareTestCtrl),
}

impl Hardware {
    fn any(&mut self) -> &mut dyn TestCtrl {
        match self {
            Self::Msr(msr) => msr,
            Self::Software(software) => software,
        }
    }
}

impl TestCtrl for Hardware {
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.any().cpuid(leaf, subleaf)
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        self.any().read_core_capabilities()
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        self.any().read_test_ctrl()
    }

    #[inline]
    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        match self {
            Self::Msr(msr) => msr.write_test_ctrl(value),
            Self::Software(software) => software.write_test_ctrl(value),
        }
    }
}

/// The hypervisor runs with interrupts off and switches tasks only where this module says so:
/// whoever holds the CPU's data is neither preempted nor migrated. NMI handlers do not touch it.
impl PreemptionDisabled for SldCpu {
    type Hardware = Hardware;

    fn this_cpu(&mut self) -> ThisCpu<'_, Hardware> {
        ThisCpu { cpu: &mut self.cpu, core: self.core, hardware: &mut self.hardware }
    }
}

impl SldCpu {
    /// The detection of a CPU of this core that is not online.
    pub const fn real(core: &'static Core) -> Self {
        Self { cpu: sld::Cpu::new(), core: &core.sld, hardware: Hardware::Msr(TestCtrlMsr) }
    }

    /// The software's for a CPU that is not online: no other CPU has a part in it.
    pub fn software() -> Self {
        let core = Box::leak(Box::new(sld::Core::new()));
        let hardware = Hardware::Software(SoftwareTestCtrl::new());
        Self { cpu: sld::Cpu::new(), core, hardware }
    }

    /// Whether it is the software's, and its bit is on.
    #[inline]
    pub const fn traces(&self) -> bool {
        matches!(&self.hardware, Hardware::Software(software) if software.is_on())
    }

    /// The mode that this CPU enforces.
    pub const fn mode(&self) -> sld::SldMode {
        self.cpu.mode()
    }
}

/// How a run is scheduled: what `hv.toml` says.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// How long a vCPU runs before the next one's turn, in ticks of the TSC.
    pub slice_ticks: u64,
    /// After how many VM exits a vCPU moves on to the next CPU.
    pub migrate_exits: Option<u64>,
    /// After how many loads all VMs are ended.
    pub stop_after_loads: Option<u64>,
    /// Whether invariants are checked at each load, put and switch.
    pub verify: bool,
    /// Whether each load and put is an event.
    pub schedule_events: bool,
}

/// What a CPU keeps to itself.
pub struct Cpu {
    /// The part that others see.
    pub shared: &'static PerCpu,
    /// Its own split-lock detection.
    pub sld: SldCpu,
    /// The software's, by which VMs are traced.
    pub tracer: SldCpu,
    /// What VM exits load.
    pub host: HostState,
    apic: LocalApic,
    pub policy: Policy,
    /// Its idle task.
    idle: Task,
    /// Events that are of no vCPU.
    ring: Ring,
    /// Tasks that can run.
    queue: RunQueue<Box<VcpuTask>>,
    /// Tasks that cannot, by their numbers.
    parked: Vec<Option<Box<VcpuTask>>>,
    /// When those of them that have a timer are to be woken.
    deadlines: Deadlines,
    /// The highest virtual time of a task that ran here: nobody who wakes is far behind it.
    floor: u64,
    /// The next CPU to even out with.
    neighbour: u32,
    /// The console, on the boot CPU if there is one.
    pub operator: Option<Box<Operator>>,
}

impl Cpu {
    /// A CPU without tasks.
    pub fn new(
        shared: &'static PerCpu,
        sld: SldCpu,
        host: HostState,
        apic: LocalApic,
        policy: Policy,
    ) -> Self {
        Self {
            shared,
            sld,
            tracer: SldCpu::software(),
            host,
            apic,
            policy,
            idle: Task::new(0),
            ring: Ring::new(),
            queue: RunQueue::new(MAX_VCPUS),
            parked: (0..MAX_VCPUS).map(|_| None).collect(),
            deadlines: Deadlines::new(MAX_VCPUS),
            floor: 0,
            neighbour: shared.index,
            operator: None,
        }
    }

    // ---- Tasks that come and go ----------------------------------------------------------------

    /// Runs tasks until all VMs are done with.
    pub fn run(&mut self) {
        // The task that has just had its turn, and wants another one.
        let mut last: Option<Box<VcpuTask>> = None;
        while !DONE.load(Ordering::Acquire) {
            self.shared.kicked.store(false, Ordering::Relaxed);
            self.receive();
            self.wake_due();
            self.attend_operator(last.is_none() && self.queue.len() == 0);
            let next = match last.take() {
                Some(task) => {
                    Some(self.queue.push_pop(task.thread.vruntime, task.is_movable(), task))
                }
                None => self.queue.pop(),
            };
            match next {
                Some((_, task)) => {
                    // Of those that have to wait for it.
                    self.share();
                    self.even_out();
                    last = self.turn(task);
                }
                None => self.wait(),
            }
        }
        self.switch_to(None);
        self.ring.write_all();
    }

    /// Takes what other CPUs have sent.
    #[inline]
    pub fn receive(&mut self) {
        if self.shared.notices.is_any() {
            platform::tell(self.shared);
        }
        while !self.shared.inbox.is_empty() {
            match self.shared.inbox.pop() {
                Some(Message::Take(task)) => self.welcome(task),
                Some(Message::Wake(id)) => {
                    self.deadlines.remove(id);
                    self.wake(id);
                }
                None => {}
            }
        }
    }

    /// A task comes from another CPU, where time may have gone faster or slower: whatever it was
    /// ahead or behind there, it neither waits for long here nor has the others wait.
    fn welcome(&mut self, mut task: Box<VcpuTask>) {
        let lag = MAX_LAG_SLICES.saturating_mul(self.policy.slice_ticks);
        let vruntime = &mut task.thread.vruntime;
        *vruntime = (*vruntime).max(self.floor.saturating_sub(lag));
        if self.shared.front.load(Ordering::Relaxed) == u64::MAX {
            // Here time has stood still.
            self.floor = self.floor.max(*vruntime);
        } else {
            *vruntime = (*vruntime).min(self.floor.saturating_add(lag));
        }
        self.enqueue(task);
    }

    fn enqueue(&mut self, task: Box<VcpuTask>) {
        self.queue.push(task.thread.vruntime, task.is_movable(), task);
    }

    /// A parked task can run again. Who slept long does not catch up on that: its virtual time is
    /// one slice behind the others' at most.
    fn wake(&mut self, id: u16) {
        let Some(mut task) = self.parked[usize::from(id)].take() else { return };
        task.thread.woken(now());
        task.thread.next = Next::Run;
        let least = self.floor.saturating_sub(self.policy.slice_ticks);
        let cost = WAKE_TICKS * USUAL_WEIGHT / u64::from(task.thread.vm.placement.weight);
        task.thread.vruntime = task.thread.vruntime.max(least) + cost;
        self.enqueue(task);
    }

    /// How long until the first timer of those that are parked here is due, in ticks of the TSC.
    pub fn ticks_to_deadline(&self, now: u64) -> u64 {
        self.deadlines.first().map_or(u64::MAX, |(deadline, _)| deadline.saturating_sub(now))
    }

    /// Wakes those whose timers are due.
    pub fn wake_due(&mut self) {
        // As a rule there is none.
        while self.deadlines.first().is_some()
            && let Some(id) = self.deadlines.pop_due(now())
        {
            let Some(task) = &self.parked[usize::from(id)] else { continue };
            let slot = &task.thread.vm.vcpus[task.thread.index as usize];
            // If somebody else has woken it, the message is on its way.
            if slot.whereabouts.unpark(self.shared.index) {
                self.wake(id);
            }
        }
    }

    /// How long until it is the console's turn, in ticks of the TSC.
    pub fn ticks_to_operator(&self, now: u64) -> u64 {
        self.operator.as_ref().map_or(u64::MAX, |operator| operator.due().saturating_sub(now))
    }

    /// Whether the console has something to do.
    pub fn is_operator_waiting(&mut self) -> bool {
        self.operator.as_mut().is_some_and(|operator| operator.is_waiting())
    }

    fn attend_operator(&mut self, is_idle: bool) {
        if let Some(mut operator) = self.operator.take() {
            operator.attend(self, is_idle);
            self.operator = Some(operator);
        }
    }

    /// Whether nobody else waits for this CPU, also of those that were sent or are due just now.
    pub fn is_idle_otherwise(&mut self) -> bool {
        self.queue.len() == 0 && {
            self.receive();
            self.wake_due();
            self.queue.len() == 0
        }
    }

    /// Whether a task that waits here comes before the one that runs.
    #[inline]
    pub fn is_wanted_before(&self, thread: &Thread) -> bool {
        self.queue.peek().is_some_and(|vruntime| vruntime < thread.vruntime)
    }

    /// Gives a task to another CPU, which is kicked if it sleeps.
    fn give(&mut self, mut task: Box<VcpuTask>, target: &'static PerCpu) {
        // SAFETY: this CPU owns the task, which is put: it comes out of the queue.
        if !unsafe { task.clear() } {
            // It stays, to be retired here.
            let vm = task.thread.vm.clone();
            self.enqueue(task);
            self.end_vm(&vm, Reason::End(End::PlatformFault));
            return;
        }
        if self.policy.migrate_exits.is_some() {
            task.thread.exits_on_arrival = task.exits();
        }
        self.send(task, target);
    }

    /// Sends a task whose VMCS is active nowhere to a CPU, which is kicked if it sleeps.
    pub fn send(&self, task: Box<VcpuTask>, target: &'static PerCpu) {
        target.inbox.push(Message::Take(task));
        if IDLE.fetch_and(!target.bit(), Ordering::SeqCst) & target.bit() != 0 {
            target.kick(self.apic);
        }
    }

    /// Gives a waiting task to a CPU that has none, if there is one of each. The one that runs next
    /// is not in the queue any more.
    #[inline]
    pub fn share(&mut self) {
        let idle = IDLE.load(Ordering::Relaxed);
        if idle != 0 {
            self.share_with(idle & !self.shared.bit());
        }
    }

    #[cold]
    fn share_with(&mut self, idle: u64) {
        let mut target = None;
        let given = self.queue.pop_movable(|task| {
            target = percpu::next(task.thread.vm.placement.cpus & idle, self.shared.index);
            target.is_some()
        });
        if let Some(((_, task), target)) = given.zip(target) {
            self.give(task, target);
        }
    }

    /// Evens out with one other CPU: whoever waits here and is further behind than what runs there
    /// goes there. Over time nobody is favoured for being where few are.
    fn even_out(&mut self) {
        let Some((vruntime, task)) = self.queue.peek_movable() else { return };
        let others = percpu::online() & task.thread.vm.placement.cpus & !self.shared.bit();
        let Some(target) = percpu::next(others, self.neighbour) else { return };
        self.neighbour = target.index;
        let behind = vruntime.saturating_add(self.policy.slice_ticks);
        if target.front.load(Ordering::Relaxed) > behind
            && let Some((_, task)) = self.queue.pop_movable(|_| true)
        {
            self.give(task, target);
        }
    }

    // ---- Turns ---------------------------------------------------------------------------------

    /// The running task has used `ticks` more; others may know.
    pub fn publish(&mut self, thread: &mut Thread, ticks: u64) {
        thread.counters.ticks += ticks;
        thread.vruntime += ticks * USUAL_WEIGHT / u64::from(thread.vm.placement.weight);
        self.floor = self.floor.max(thread.vruntime);
        self.shared.front.store(thread.vruntime, Ordering::Relaxed);
    }

    /// One turn of a task. It is given back if it wants another one here.
    fn turn(&mut self, mut task: Box<VcpuTask>) -> Option<Box<VcpuTask>> {
        let mut start = now();
        self.shared.front.store(task.thread.vruntime, Ordering::Relaxed);
        if task.thread.vm.is_over() {
            task.thread.next = Next::Retire;
        }
        // Its output is written in its own time.
        if !task.thread.has_written() {
            task.thread.write_output(self.policy.slice_ticks / 2);
        }
        let written = task.thread.has_written();
        let mailbox_empty = {
            let thread = &task.thread;
            thread.vm.vcpus[thread.index as usize].mailbox.is_empty()
        };
        match task.thread.next {
            Next::Retire if written => {
                self.retire(task);
                return None;
            }
            // What waits for a vCPU that sleeps wakes it.
            Next::Sleep(until) if mailbox_empty && until.is_none_or(|until| until > now()) => {
                if written {
                    self.park(task, until, until.is_none());
                    return None;
                }
            }
            Next::Wait if written => {
                self.park(task, None, false);
                return None;
            }
            Next::Retire | Next::Wait => {}
            Next::Run | Next::Sleep(_) => {
                task.thread.woken(start);
                task.thread.next = Next::Run;
                if written || !task.thread.must_write() {
                    let before = task.thread.counters.ticks;
                    self.run_guest(&mut task, self.policy.slice_ticks);
                    // What `publish` has counted meanwhile.
                    start += task.thread.counters.ticks - before;
                }
            }
        }
        self.publish(&mut task.thread, now().saturating_sub(start));
        if let Some(limit) = self.policy.migrate_exits
            && task.exits() - task.thread.exits_on_arrival >= limit
        {
            let others = percpu::online() & task.thread.vm.placement.cpus & !self.shared.bit();
            if let Some(target) = percpu::next(others, self.shared.index) {
                self.give(task, target);
                return None;
            }
        }
        Some(task)
    }

    /// A task sleeps until it is woken: by a message, or at `until`.
    fn park(&mut self, mut task: Box<VcpuTask>, until: Option<u64>, forever: bool) {
        let Thread { id, index, .. } = task.thread;
        let vm = task.thread.vm.clone();
        if !vm.park(index, self.shared.index, forever) {
            task.thread.next = Next::Run;
            return self.enqueue(task);
        }
        self.parked[usize::from(id)] = Some(task);
        if let Some(until) = until {
            self.deadlines.set(id, until);
        }
        if vm.is_over() {
            self.tell_end(&vm);
        }
    }

    /// Nothing to do: sleeps until kicked, or until the next timer is due.
    fn wait(&mut self) {
        self.switch_to(None);
        self.shared.front.store(u64::MAX, Ordering::Relaxed);
        // Nobody waits for this CPU.
        if self.ring.write_one() {
            return;
        }
        IDLE.fetch_or(self.shared.bit(), Ordering::SeqCst);
        // Who has sent something since looks at `IDLE` after it, and kicks.
        let deadline = self.deadlines.first().map(|(deadline, _)| deadline);
        let operator = self.operator.as_ref();
        let due = operator.map(|operator| if operator.is_busy() { 0 } else { operator.due() });
        let deadline = deadline.into_iter().chain(due).min();
        let sleeps = self.shared.inbox.is_empty()
            && !DONE.load(Ordering::SeqCst)
            && self.ring.is_empty()
            && self.apic.set_deadline(deadline) | deadline.is_none();
        if sleeps {
            // SAFETY: at CPL 0 with interrupts off; the IDT has handlers for the timer and NMIs.
            unsafe { idle::wait(&raw const self.shared.kicked) };
            if deadline.is_some() {
                self.apic.set_deadline(None);
            }
        } else {
            core::hint::spin_loop();
        }
        IDLE.fetch_and(!self.shared.bit(), Ordering::SeqCst);
    }

    /// From now on this CPU runs this task, or its idle one.
    pub fn switch_to(&mut self, thread: Option<&mut Thread>) {
        match thread {
            Some(thread) => {
                let written = sld::task_switch(&mut self.sld, thread.real_task());
                if self.report(written).is_some_and(|real_bit| {
                    thread.push(self.shared, Event::RealBit(real_bit));
                    true
                }) {
                    thread.counters.real_bit_writes += 1;
                }
                if self.tracer.mode() != sld::SldMode::Off {
                    self.switch_tracer(thread);
                }
                self.verify("switch", Some(thread));
            }
            None => {
                let written = sld::task_switch(&mut self.sld, &self.idle);
                self.note(written);
                let written = sld::task_switch(&mut self.tracer, &self.idle);
                self.note_tracer(written);
                self.verify("switch", None);
            }
        }
    }

    #[inline(never)]
    fn switch_tracer(&mut self, thread: &mut Thread) {
        let traced = if thread.is_traced() { &thread.sld } else { &self.idle };
        let written = sld::task_switch(&mut self.tracer, traced);
        if let Some(bit) = self.report(written) {
            thread.push(self.shared, Event::TraceBit(bit));
        }
    }

    fn report(&self, written: Written) -> Option<RealBit> {
        written.unwrap_or_else(|fault| {
            log::error!("CPU {}: MSR 0x33: {fault}", self.shared.index);
            None
        })
    }

    /// Records what an operation of `sld` that is on nobody's account did to the real bit.
    pub fn note(&mut self, written: Written) {
        if let Some(real_bit) = self.report(written) {
            self.ring.push(percpu::stamp(), None, Event::RealBit(real_bit));
        }
    }

    /// VMs may be traced here from now on, if there is a mode for that.
    pub fn start_tracing(&mut self, mode: Option<sld::SldMode>) {
        if let Some(mode) = mode {
            let online = sld::online(&mut self.tracer, mode);
            self.note_tracer(Ok(online.real_bit));
        }
    }

    /// No VM is any more.
    pub fn stop_tracing(&mut self) {
        let written = sld::offline(&mut self.tracer);
        self.note_tracer(written);
    }

    fn note_tracer(&mut self, written: Written) {
        if let Some(bit) = self.report(written) {
            self.ring.push(percpu::stamp(), None, Event::TraceBit(bit));
        }
    }

    /// Writes the CPU's own events out.
    pub fn write_events(&mut self) {
        self.ring.write_all();
    }

    /// Checks split-lock detection's invariants, if that is wished. `None` is the idle task.
    #[inline]
    pub fn verify(&mut self, when: &str, thread: Option<&Thread>) {
        if self.policy.verify {
            let task = thread.map_or(&self.idle, Thread::real_task);
            if let Err(violation) = sld::verify(&mut self.sld, task) {
                self.violated(when, violation);
            }
            let traced = thread.filter(|thread| thread.is_traced());
            let task = traced.map_or(&self.idle, |thread| &thread.sld);
            if let Err(violation) = sld::verify(&mut self.tracer, task) {
                self.violated(when, violation);
            }
        }
    }

    #[cold]
    fn violated(&mut self, when: &str, violation: Violation) {
        VIOLATIONS.fetch_add(1, Ordering::Relaxed);
        let cpu = self.shared.index;
        log::error!("invariant violated: CPU {cpu}, {when}: {violation}");
        events::write(percpu::stamp(), "violation", |json| {
            json.text("what", format_args!("{when}: {violation}"))
        });
    }

    // ---- Others --------------------------------------------------------------------------------

    /// Something was posted to the vCPU: it is kicked out of the guest, or woken.
    pub fn deliver(&self, vm: &Vm, slot: &Slot) {
        let Some((cpu, wake)) = vm.notify(slot) else { return };
        let Some(target) = percpu::get(cpu) else { return };
        if let Some(id) = wake {
            target.inbox.push(Message::Wake(id));
        }
        if cpu == self.shared.index {
            // The guest loop looks at this before it enters the guest.
            self.shared.kicked.store(true, Ordering::Relaxed);
        } else {
            target.kick(self.apic);
        }
    }

    /// Kicks the core's threads that are named.
    pub fn kick_siblings(&self, threads: u16) {
        let core = self.shared.core.id;
        percpu::all(percpu::online())
            .filter(|cpu| cpu.core.id == core && threads & 1 << cpu.thread != 0)
            .for_each(|cpu| cpu.kick(self.apic));
    }

    /// This thread of the core is about to run a guest: once no sibling steps.
    pub fn enter_core(&self) {
        while !self.shared.core.gate.enter(self.shared.thread) {
            core::hint::spin_loop();
        }
    }

    /// This thread of the core runs no guest.
    pub fn leave_core(&self) {
        self.shared.core.gate.leave(self.shared.thread);
    }

    /// An interrupt came while a guest ran.
    pub fn interrupt(&self, vector: u8) {
        static TOLD: AtomicBool = AtomicBool::new(false);
        if vector == SPURIOUS_VECTOR {
            return;
        }
        self.apic.end_of_interrupt();
        // The timer was armed for a sleep that has ended.
        if vector != TIMER_VECTOR && !TOLD.swap(true, Ordering::Relaxed) {
            let cpu = self.shared.index;
            log::warn!("interrupt {vector} on CPU {cpu}: no device is set up for any");
        }
    }

    /// A VM is over: its vCPUs are to know.
    pub fn end_vm(&self, vm: &Vm, reason: Reason) {
        vm.end(reason);
        self.tell_end(vm);
    }

    fn tell_end(&self, vm: &Vm) {
        for slot in &vm.vcpus {
            slot.mailbox.post_end();
            self.deliver(vm, slot);
        }
    }

    /// Counts a load where loads are limited.
    pub fn count_load(&self) {
        let Some(limit) = self.policy.stop_after_loads else { return };
        if LOADS.fetch_add(1, Ordering::Relaxed) == limit {
            let vms = fleet::places().iter().filter_map(Place::vm);
            vms.for_each(|vm| self.end_vm(&vm, Reason::LoadLimit));
        }
    }

    /// A vCPU of a VM that is over: what it has counted is told, and it is no more.
    fn retire(&mut self, mut task: Box<VcpuTask>) {
        // SAFETY: this CPU owns the task, which is put.
        unsafe { task.clear() };
        let counters = task.counters();
        let vm = task.thread.vm.clone();
        vm.vcpus[task.thread.index as usize].whereabouts.set_gone();
        let (name, index) = task.thread.subject();
        summary::offenders(name, task.thread.offenders());
        events::write(percpu::stamp(), "vcpu-end", |json| {
            json.text("vm", name)?;
            json.number("vcpu", index)?;
            counters.write(json)
        });
        drop(task);
        if let Some(sum) = vm.retire(&counters) {
            vm_ended(&vm, &sum);
            drop(vm);
            self.release();
        }
    }

    /// One less that keeps the run open.
    pub fn release(&self) {
        if VMS_LEFT.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish();
        }
    }

    /// All VMs are done with.
    fn finish(&self) {
        DONE.store(true, Ordering::SeqCst);
        percpu::all(percpu::online() & !self.shared.bit()).for_each(|cpu| cpu.kick(self.apic));
    }
}

/// Says how a VM has ended, and prints the end of its last line.
fn vm_ended(vm: &Vm, counters: &Counters) {
    let name = vm.name;
    let reason = vm.reason().unwrap_or(Reason::Halt);
    vm.end_line();
    while vm.has_lines() {
        console::with(|console| vm.print_line(console));
    }
    match reason {
        Reason::End(End::Exit(status)) => log::info!("VM {name} ended itself with status {status}"),
        Reason::End(End::SplitLock) => log::error!(
            "VM {name} is stopped: split lock, and the policy is fatal. The others go on"
        ),
        Reason::End(End::BogusAc) => log::error!(
            "VM {name} is stopped: #AC although split-lock detection is off. The CPU or the \
             firmware misbehaves"
        ),
        Reason::Stopped => log::info!("VM {name} is stopped"),
        other => log::warn!("VM {name} has ended: {other}"),
    }
    events::write(percpu::stamp(), "vm-end", |json| {
        json.text("vm", name)?;
        json.text("reason", reason)?;
        if let Reason::End(End::Exit(status)) = reason {
            json.number("status", status)?;
        }
        counters.write(json)
    });
    let locks = &counters.split_locks;
    match reason {
        Reason::End(End::Exit(status)) => {
            summary::ended(name, format_args!("exit {status}"), Colour::Text, locks);
        }
        Reason::Stopped => summary::ended(name, format_args!("{reason}"), Colour::Text, locks),
        Reason::End(End::SplitLock) | Reason::Halt | Reason::TimeLimit | Reason::LoadLimit => {
            summary::ended(name, format_args!("{reason}"), Colour::Warning, locks);
        }
        Reason::End(_) => summary::ended(name, format_args!("{reason}"), Colour::Error, locks),
    }
    vm.set_last(Last { reason, counters: counters.clone() });
    let mut totals = TOTALS.lock();
    totals.0.add(counters);
    totals.1 += 1;
}

/// Says how many VMs there are, before any CPU runs one.
pub fn set_vms(count: u32) {
    VMS_LEFT.store(count, Ordering::Release);
    DONE.store(count == 0, Ordering::Release);
}

/// Keeps the run open, as one more VM would, until [`Cpu::release`]. False if it is over already.
pub fn hold() -> bool {
    let add = |left: u32| (left > 0).then(|| left + 1);
    VMS_LEFT.fetch_update(Ordering::AcqRel, Ordering::Acquire, add).is_ok()
}

/// What the VMs have counted, how many they were, and how many invariants did not hold.
pub fn totals() -> (Counters, u64, u64) {
    let totals = TOTALS.lock();
    (totals.0.clone(), totals.1, VIOLATIONS.load(Ordering::Relaxed))
}
