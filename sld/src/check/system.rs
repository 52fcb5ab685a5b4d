//! Small systems: CPUs, an idle task each, vCPU tasks; what may happen in them, and what must
//! hold after every step.

use std::format;
use std::string::String;
use std::sync::atomic::{AtomicU32, Ordering};
use std::vec::Vec;

use super::hardware::{Access, BIT, Kind, Thread};
use crate::smt::LOCKED;
use crate::{
    AcContext, Core, Cpu, Detection, Fallback, Host, Msr, MsrFault, MsrWrite, Online, PerSecond,
    Policy, PolicyError, PreemptionDisabled, ProbeFailure, RealBit, SldMode, Task, TestCtrl,
    ThisCpu, Vcpu, Verdict, Violation, VmPolicy, Why,
};

/// A bit of 0x33 that is not the guest's.
pub const OTHER: u64 = 1 << 3;

/// What the firmware left in the platform's bits.
const PLATFORM: u64 = 0x8000_0000_0000_0011;

/// To what a VM may be limited.
pub const LIMIT: Policy = Policy::RateLimit(PerSecond::new(10).unwrap());

/// All policies, beginning with `first`.
pub fn policies_from(first: Policy) -> &'static [Policy] {
    use Policy::{Emulate, Fatal, Off, Step, Warn};
    static TWICE: [Policy; 12] =
        [Off, Warn, Step, Emulate, LIMIT, Fatal, Off, Warn, Step, Emulate, LIMIT, Fatal];
    let at = TWICE.iter().position(|&policy| policy == first).unwrap();
    &TWICE[at..at + 6]
}

/// What stays the same while a system runs: `C` CPUs (threads), `V` vCPUs.
#[derive(Clone, Debug)]
pub struct Config<const C: usize, const V: usize> {
    pub mode: SldMode,
    /// The core to which each CPU belongs.
    pub core_of: [usize; C],
    /// The kind of each core.
    pub kinds: [Kind; C],
    /// Bit 29 at boot.
    pub boot_on: bool,
    pub vms: [Vm; V],
    /// From now on every write of 0x33 faults.
    pub writes_fault: bool,
}

/// A VM of one vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Vm {
    /// Its policy at first, and what is tried on it later, that one included.
    pub policies: &'static [Policy],
    pub expose: bool,
    /// Its task has the flag set before it first loads the vCPU.
    pub flagged: bool,
}

/// Everything that a step may depend on: the state under test, the hardware's, and what the
/// invariants need to remember of the past.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct System<const C: usize, const V: usize> {
    pub(super) msrs: [u64; C],
    pub(super) cores: [u32; C],
    pub(super) cpus: [Cpu; C],
    /// What each CPU runs; nothing while it is offline.
    pub(super) running: [Option<Runs>; C],
    /// The CPUs that step: no other of the core runs its guest.
    steps: [bool; C],
    tasks: Tasks<C, V>,
    vcpus: [Vcpu; V],
    past: [Past; V],
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Tasks<const C: usize, const V: usize> {
    idle: [Task; C],
    vcpu: [Task; V],
}

impl<const C: usize, const V: usize> Tasks<C, V> {
    fn run_by(&self, cpu: usize, runs: Runs) -> &Task {
        match runs {
            Runs::Idle => &self.idle[cpu],
            Runs::Vcpu(vcpu) => &self.vcpu[vcpu],
        }
    }

    fn run_by_mut(&mut self, cpu: usize, runs: Runs) -> &mut Task {
        match runs {
            Runs::Idle => &mut self.idle[cpu],
            Runs::Vcpu(vcpu) => &mut self.vcpu[vcpu],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Runs {
    Idle,
    Vcpu(usize),
}

/// A vCPU's history as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Past {
    policy: Policy,
    /// What the guest must read from 0x33.
    virtual_msr: u64,
    loaded: bool,
    flag_at_load: bool,
    warned_since_load: bool,
    warned: bool,
    /// The host changed the virtual MSR from elsewhere: the next load is what propagates it.
    stale: bool,
    /// A split lock's #AC, on a core of this kind, waits for its verdict.
    pending: Option<Kind>,
    /// The VM was killed; its task has not gone yet.
    dead: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Online(usize),
    Offline(usize),
    Switch(usize, Runs),
    Load(usize),
    Put(usize),
    GuestWrite(usize, Msr, u64),
    HostWrite(usize, usize, u64),
    Reset(usize),
    SetPolicy(usize, Policy),
    /// The guest that runs on this CPU splits a lock, and the hardware raises #AC.
    SplitLock(usize),
    /// The hypervisor handles it, possibly much later and on another CPU.
    Verdict(usize),
    /// The hypervisor handles a legacy #AC, raised whenever.
    Legacy(usize),
    /// It handles another #AC, where nothing can have raised it.
    Bogus(usize),
    StepBegin(usize),
    StepEnd(usize),
}

/// An invariant that does not hold.
#[derive(Debug)]
pub struct Broken {
    pub invariant: &'static str,
    pub detail: String,
}

macro_rules! ensure {
    ($condition:expr, $invariant:expr, $($detail:tt)*) => {
        if !$condition {
            return Err(Broken { invariant: $invariant, detail: format!($($detail)*) });
        }
    };
}

const SPLIT_LOCK: AcContext = AcContext { cpl: 0, cr0_am: true, eflags_ac: true };
const LEGACY: AcContext = AcContext { cpl: 3, cr0_am: true, eflags_ac: true };

// The invariants, as they are reported.
const NO_REDUNDANT_WRITE: &str = "no WRMSR that changes nothing";
const PLATFORM_BITS: &str = "the other bits of 0x33 never change";
const NOT_ON_THE_LIST: &str = "0x33 is never touched on a CPU that is not on the list";
const CRITICAL_SECTION: &str = "0x33 is read and written with the core locked";
const NEIGHBOUR: &str = "detection is never off for a thread whose task wants it on, but in a step";
const STEP: &str = "the real bit is off while a thread of the core steps";
const ONE_WRITE: &str = "one operation writes the real bit once at most";
const REPORTED: &str = "every write of the real bit is reported, with its value and reason";
const ISOLATION: &str = "no operation changes another task, vCPU or CPU";
const PROBED: &str = "a CPU enforces the host's mode if its bit works, else it runs as off";
const WARN: &str =
    "warn: the real bit is off exactly if all threads run tasks with the flag, or one steps";
const FATAL: &str = "fatal: the real bit is always 1";
const OFF: &str = "off: the real bit is always 0";
const BOOT_VALUE: &str = "an offline core has its boot value";
const NO_FLAG: &str = "no flag is set where detection is off or fatal";
const MIRROR: &str = "a CPU knows the flag of the task that it runs";
const UNAWARE: &str = "a guest that is not told has the host's setting until it is warned";
const GUEST_SEES: &str =
    "a loaded vCPU sees in hardware what it wrote, unless a sibling forbids it";
const SEES_ALL: &str = "the real bit is on while a VM is loaded whose policy is to see all";
const VM_OFF: &str = "a VM that is off and not told has detection only where a sibling has it";
const PUT_RESTORES: &str = "put gives the task back the flag that it came with";
const READ_BACK: &str = "the guest reads what it wrote, and is told what it has";
const MASKED: &str = "bits outside the mask are #GP and change nothing";
const STORES: &str = "where the bit is to stay on, a write is stored without propagating";
const LOADED_HERE: &str = "a write touches hardware only if loaded here";
const VERDICT: &str = "the verdict is the table's";
const WARN_ONCE: &str = "a task is warned once, and never where nobody wants to know";
const POLICY: &str = "a VM has the last policy that it was given and the host can keep";
const START_OVER: &str = "a new policy finds all as if the VM had always had it";
const PROGRESS: &str = "after a verdict to resume, the instruction completes";
const FAULT_LEAVES: &str = "an access that faults leaves flags and hardware as they were";
const NO_FAULT: &str = "no operation fails on hardware that works";
const VERIFY: &str = "verify finds nothing wrong, and changes nothing";

struct Here<'a> {
    cpu: &'a mut Cpu,
    core: &'a Core,
    hardware: Watched<'a>,
}

impl<'a> PreemptionDisabled for Here<'a> {
    type Hardware = Watched<'a>;

    fn this_cpu(&mut self) -> ThisCpu<'_, Watched<'a>> {
        ThisCpu { cpu: self.cpu, core: self.core, hardware: &mut self.hardware }
    }
}

/// The hardware, with an eye on the lock under which it is written.
struct Watched<'a> {
    thread: Thread<'a>,
    core: &'a Core,
    unlocked: bool,
}

impl TestCtrl for Watched<'_> {
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.thread.cpuid(leaf, subleaf)
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        self.thread.read_core_capabilities()
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        self.unlocked |= self.core.0.load(Ordering::Relaxed) & LOCKED == 0;
        self.thread.read_test_ctrl()
    }

    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        self.unlocked |= self.core.0.load(Ordering::Relaxed) & LOCKED == 0;
        self.thread.write_test_ctrl(value)
    }
}

impl<const C: usize, const V: usize> Config<C, V> {
    pub fn kind(&self, cpu: usize) -> Kind {
        self.kinds[self.core_of[cpu]]
    }

    /// Whether this CPU can be asked to step; elsewhere, to ask does nothing.
    fn warns(&self, cpu: usize) -> bool {
        self.mode == SldMode::Warn && self.kind(cpu).works()
    }

    /// Whether this CPU has siblings, online or not.
    fn has_siblings(&self, cpu: usize) -> bool {
        self.core_of.iter().filter(|&&core| core == self.core_of[cpu]).count() > 1
    }

    fn mixed(&self) -> bool {
        self.kinds.iter().any(|&kind| kind != self.kinds[0])
    }

    fn boot_value(&self) -> u64 {
        PLATFORM | if self.boot_on { BIT } else { 0 }
    }

    /// Whether the host allows this policy.
    fn keeps(&self, policy: Policy) -> bool {
        match self.mode {
            SldMode::Off => policy == Policy::Off,
            SldMode::Warn => true,
            SldMode::Fatal => [Policy::Emulate, Policy::Fatal].contains(&policy),
        }
    }

    /// Whether the flag is set in a task of a VM with this policy, before it loads its vCPU.
    fn unloaded_flag(&self, policy: Policy) -> bool {
        self.mode == SldMode::Warn && policy == Policy::Off
    }

    fn exposed(&self, vcpu: usize) -> bool {
        self.vms[vcpu].expose && self.mode != SldMode::Off
    }

    fn vm(&self, vcpu: usize, policy: Policy) -> VmPolicy {
        let configured = match self.mode {
            SldMode::Off => Policy::Off,
            SldMode::Warn => Policy::Warn,
            SldMode::Fatal => Policy::Fatal,
        };
        let host = Host { configured, enforced: self.mode };
        let own = (policy != configured).then_some(policy);
        VmPolicy::new(host, own, self.vms[vcpu].expose).unwrap()
    }

    /// A new VM's task, vCPU and history.
    fn start(&self, vcpu: usize) -> (Task, Vcpu, Past) {
        let Vm { policies, flagged, .. } = self.vms[vcpu];
        let policy = policies[0];
        let vm = self.vm(vcpu, policy);
        let mut task = Task::of_vcpu(vcpu as u32, vm);
        task.disabled |= flagged;
        let past = Past {
            policy,
            virtual_msr: 0,
            loaded: false,
            flag_at_load: false,
            warned_since_load: false,
            warned: false,
            stale: false,
            pending: None,
            dead: false,
        };
        (task, Vcpu::new(vm), past)
    }

    fn accepts(&self, vcpu: usize, value: u64) -> bool {
        value == 0 || (value == BIT && self.exposed(vcpu))
    }
}

impl<const C: usize, const V: usize> System<C, V> {
    /// Everything switched off.
    pub fn new(config: &Config<C, V>) -> Self {
        Self {
            msrs: [config.boot_value(); C],
            cores: [0; C],
            cpus: [const { Cpu::new() }; C],
            running: [None; C],
            steps: [false; C],
            tasks: Tasks {
                idle: std::array::from_fn(|cpu| Task::new((V + cpu) as u32)),
                vcpu: std::array::from_fn(|vcpu| config.start(vcpu).0),
            },
            vcpus: std::array::from_fn(|vcpu| config.start(vcpu).1),
            past: std::array::from_fn(|vcpu| config.start(vcpu).2),
        }
    }

    /// All that may happen next.
    pub fn enabled(&self, config: &Config<C, V>) -> Vec<Op> {
        let mut ops = Vec::new();
        for cpu in 0..C {
            let Some(runs) = self.running[cpu] else {
                ops.push(Op::Online(cpu));
                continue;
            };
            if self.steps[cpu] {
                ops.push(Op::StepEnd(cpu));
                continue;
            }
            ops.push(Op::Offline(cpu));
            // Guest state may stay loaded in a task that is switched away, even one that migrates,
            // except between CPUs that differ in what they detect.
            let may_leave = match runs {
                Runs::Vcpu(vcpu) => !config.mixed() || !self.past[vcpu].loaded,
                Runs::Idle => true,
            };
            for vcpu in 0..V {
                if may_leave && !self.running.contains(&Some(Runs::Vcpu(vcpu))) {
                    ops.push(Op::Switch(cpu, Runs::Vcpu(vcpu)));
                }
                ops.extend([0, BIT, BIT | OTHER].map(|value| Op::HostWrite(cpu, vcpu, value)));
            }
            let Runs::Vcpu(vcpu) = runs else { continue };
            ops.push(Op::Put(cpu));
            if may_leave {
                ops.push(Op::Switch(cpu, Runs::Idle));
            }
            let past = &self.past[vcpu];
            if past.dead {
                continue;
            }
            ops.extend([Op::Load(cpu), Op::Legacy(cpu)]);
            let policies = config.vms[vcpu].policies.iter();
            ops.extend(policies.map(|&policy| Op::SetPolicy(cpu, policy)));
            if config.mode == SldMode::Off || !config.kind(cpu).works() {
                ops.push(Op::Bogus(cpu));
            }
            if !config.warns(cpu) {
                ops.extend([Op::StepBegin(cpu), Op::StepEnd(cpu)]);
            } else if (config.has_siblings(cpu) || sees_all(past.policy))
                && !self.core_steps(config, cpu)
            {
                ops.push(Op::StepBegin(cpu));
            }
            match past.pending {
                // CPUs that differ in what they detect do not judge each other's #ACs.
                Some(kind) if kind != config.kind(cpu) => {}
                Some(_) => ops.push(Op::Verdict(cpu)),
                None => {
                    for value in [0, BIT, OTHER, BIT | OTHER] {
                        ops.push(Op::GuestWrite(cpu, Msr::TestCtrl, value));
                    }
                    ops.push(Op::GuestWrite(cpu, Msr::CoreCapabilities, 0x20));
                    ops.push(Op::Reset(cpu));
                    if past.loaded && config.kind(cpu).readable() && self.bit(config, cpu) {
                        ops.push(Op::SplitLock(cpu));
                    }
                }
            }
        }
        ops
    }

    /// `op` where every write of 0x33 faults: unless it succeeds because it writes nothing, flags
    /// and hardware are as before.
    pub fn step_with_fault(&self, config: &Config<C, V>, op: Op) -> Result<(), Broken> {
        let faulty = Config { writes_fault: true, ..config.clone() };
        let mut next = self.clone();
        match (op, next.apply(&faulty, op, self)) {
            (Op::Online(_), _) => Ok(()),
            (_, Err(Broken { invariant: NO_FAULT, .. })) => {
                let policy = matches!(op, Op::SetPolicy(..)) && next.vcpus != self.vcpus;
                let same = !policy
                    && next.tasks == self.tasks
                    && next.cpus == self.cpus
                    && next.cores == self.cores
                    && next.msrs == self.msrs;
                ensure!(same, FAULT_LEAVES, "{op:?}");
                Ok(())
            }
            (_, other) => other,
        }
    }

    /// The system after `op`, one of [`enabled`](Self::enabled), if the invariants of what
    /// happens hold; those of what is, [`check_state`](Self::check_state) knows.
    pub fn step(&self, config: &Config<C, V>, op: Op) -> Result<Self, Broken> {
        let mut next = self.clone();
        next.apply(config, op, self)?;
        next.check_isolation(config, op, self)?;
        next.reuse(config);
        Ok(next)
    }

    /// The places of VMs that have ended are taken by new ones.
    fn reuse(&mut self, config: &Config<C, V>) {
        for vcpu in 0..V {
            if self.past[vcpu].dead && !self.running.contains(&Some(Runs::Vcpu(vcpu))) {
                (self.tasks.vcpu[vcpu], self.vcpus[vcpu], self.past[vcpu]) = config.start(vcpu);
            }
        }
    }

    /// Bit 29 as the hardware of this CPU has it.
    fn bit(&self, config: &Config<C, V>, cpu: usize) -> bool {
        self.msrs[config.core_of[cpu]] & BIT != 0
    }

    /// Whether a thread of this CPU's core steps.
    pub(super) fn core_steps(&self, config: &Config<C, V>, cpu: usize) -> bool {
        (0..C).any(|other| self.steps[other] && config.core_of[other] == config.core_of[cpu])
    }

    /// The flag of the task that this CPU runs.
    pub(super) fn flag(&self, cpu: usize, runs: Runs) -> bool {
        self.tasks.run_by(cpu, runs).disabled
    }

    /// The online threads that share `cpu`'s core, without itself.
    pub(super) fn siblings(
        &self,
        config: &Config<C, V>,
        cpu: usize,
    ) -> impl Iterator<Item = (usize, Runs)> {
        let core_of = config.core_of;
        let online = self.running;
        (0..C)
            .filter(move |&other| other != cpu && core_of[other] == core_of[cpu])
            .filter_map(move |other| Some((other, online[other]?)))
    }

    /// Runs one operation on `cpu` under a guard; its result, and the values written to 0x33.
    fn on<T>(
        &mut self,
        config: &Config<C, V>,
        cpu: usize,
        operation: impl FnOnce(&mut Here<'_>, &mut Tasks<C, V>, &mut [Vcpu; V]) -> T,
    ) -> Result<(T, Vec<u64>), Broken> {
        let index = config.core_of[cpu];
        let core = Core(AtomicU32::new(self.cores[index]));
        let neighbours_want_on = config.mode != SldMode::Off
            && config.kind(cpu).works()
            && !self.core_steps(config, cpu)
            && self.siblings(config, cpu).any(|(other, runs)| !self.flag(other, runs));
        let kind = if config.writes_fault { Kind::ReadOnly } else { config.kind(cpu) };
        let thread = Thread { kind, msr: &mut self.msrs[index], accesses: Vec::new() };
        let mut here = Here {
            cpu: &mut self.cpus[cpu],
            core: &core,
            hardware: Watched { thread, core: &core, unlocked: false },
        };
        let result = operation(&mut here, &mut self.tasks, &mut self.vcpus);
        let Watched { thread, unlocked, .. } = here.hardware;
        let accesses = thread.accesses;
        self.cores[index] = core.0.into_inner();

        ensure!(!unlocked, CRITICAL_SECTION, "cpu {cpu}");
        let mut written = Vec::new();
        for access in accesses {
            let Access::Write { old, new } = access else {
                ensure!(false, NOT_ON_THE_LIST, "cpu {cpu}");
                continue;
            };
            ensure!(new != old, NO_REDUNDANT_WRITE, "{new:#x}");
            ensure!(new & !BIT == PLATFORM, PLATFORM_BITS, "{new:#x}");
            ensure!(new & BIT != 0 || !neighbours_want_on, NEIGHBOUR, "cpu {cpu} wrote {new:#x}");
            written.push(new);
        }
        Ok((result, written))
    }

    fn apply(&mut self, config: &Config<C, V>, op: Op, before: &Self) -> Result<(), Broken> {
        let mode = config.mode;
        match op {
            Op::Online(cpu) => {
                let first = self.siblings(config, cpu).next().is_none();
                self.running[cpu] = Some(Runs::Idle);
                let (Online { detection, real_bit }, written) =
                    self.on(config, cpu, |here, _, _| crate::online(here, mode))?;
                let as_expected = match config.kind(cpu) {
                    Kind::Enumerated | Kind::IceLake => detection == Detection::Works,
                    Kind::Absent => detection == Detection::Absent,
                    Kind::Hidden => detection == Detection::Failed(ProbeFailure::ReadFault),
                    Kind::ReadOnly => {
                        matches!(detection, Detection::Failed(ProbeFailure::WriteFault(_)))
                    }
                    Kind::Stuck => {
                        matches!(detection, Detection::Failed(ProbeFailure::ReadBack { .. }))
                    }
                };
                ensure!(as_expected, PROBED, "cpu {cpu}: {detection:?}");
                if config.kind(cpu).works() {
                    let toggled = [0, BIT].map(|bit| written.contains(&(PLATFORM | bit)));
                    ensure!(!first || toggled == [true; 2], PROBED, "wrote {written:x?}");
                    ensure!(first || written.len() <= 1, ONE_WRITE, "wrote {written:x?}");
                    self.check_report(&written, real_bit, Why::Boot)?;
                } else {
                    ensure!(real_bit.is_none(), REPORTED, "{real_bit:?} of a CPU that fails");
                }
            }
            Op::Offline(cpu) => {
                let (result, written) = self.on(config, cpu, |here, _, _| crate::offline(here))?;
                self.check_written(&written, result, Why::Offline)?;
                if let Some(Runs::Vcpu(vcpu)) = self.running[cpu].take() {
                    self.past[vcpu].dead = true;
                }
            }
            Op::Switch(cpu, next) => {
                let (result, written) = self.on(config, cpu, |here, tasks, _| {
                    crate::task_switch(here, tasks.run_by(cpu, next))
                })?;
                self.check_written(&written, result, Why::TaskSwitch)?;
                self.running[cpu] = Some(next);
            }
            Op::Load(cpu) => {
                let vcpu = self.vcpu_on(cpu);
                let (result, written) = self.on(config, cpu, |here, tasks, vcpus| {
                    vcpus[vcpu].load(here, &mut tasks.vcpu[vcpu])
                })?;
                self.check_written(&written, result, Why::Load)?;
                let past = &mut self.past[vcpu];
                if !past.loaded {
                    past.loaded = true;
                    past.flag_at_load = before.tasks.vcpu[vcpu].disabled;
                    past.warned_since_load = false;
                }
                past.stale = false;
            }
            Op::Put(cpu) => {
                let vcpu = self.vcpu_on(cpu);
                let (result, written) = self.on(config, cpu, |here, tasks, vcpus| {
                    vcpus[vcpu].put(here, &mut tasks.vcpu[vcpu])
                })?;
                self.check_written(&written, result, Why::Put)?;
                let past = &mut self.past[vcpu];
                let flag = self.tasks.vcpu[vcpu].disabled;
                let came_with = if past.loaded {
                    let has_say = config.exposed(vcpu) || sees_all(past.policy);
                    let warned = past.warned_since_load && !has_say;
                    past.flag_at_load || warned
                } else {
                    before.tasks.vcpu[vcpu].disabled
                };
                ensure!(flag == came_with, PUT_RESTORES, "flag {flag}, came with {came_with}");
                past.loaded = false;
                past.stale = false;
                past.flag_at_load = false;
                past.warned_since_load = false;
            }
            Op::GuestWrite(cpu, msr, value) => {
                let vcpu = self.vcpu_on(cpu);
                let (result, written) = self.on(config, cpu, |here, tasks, vcpus| {
                    vcpus[vcpu].guest_wrmsr(here, &mut tasks.vcpu[vcpu], msr, value)
                })?;
                let accepted = msr == Msr::TestCtrl && config.accepts(vcpu, value);
                self.check_write(config, vcpu, accepted, &written, result)?;
                if accepted {
                    self.changed(vcpu, value, true, &written)?;
                }
            }
            Op::HostWrite(cpu, vcpu, value) => {
                let runs = self.running[cpu].unwrap();
                let (result, written) = self.on(config, cpu, |here, tasks, vcpus| {
                    vcpus[vcpu].host_write(here, tasks.run_by_mut(cpu, runs), value)
                })?;
                let accepted = config.accepts(vcpu, value);
                self.check_write(config, vcpu, accepted, &written, result)?;
                if accepted {
                    self.changed(vcpu, value, runs == Runs::Vcpu(vcpu), &written)?;
                }
            }
            Op::Reset(cpu) => {
                let vcpu = self.vcpu_on(cpu);
                let (result, written) = self.on(config, cpu, |here, tasks, vcpus| {
                    vcpus[vcpu].reset(here, &mut tasks.vcpu[vcpu])
                })?;
                self.check_written(&written, result, Why::GuestWrite)?;
                self.changed(vcpu, 0, true, &written)?;
            }
            Op::SetPolicy(cpu, policy) => self.set_policy(config, cpu, policy, before)?,
            Op::SplitLock(cpu) => {
                let vcpu = self.vcpu_on(cpu);
                self.past[vcpu].pending = Some(config.kind(cpu));
            }
            Op::Verdict(cpu) => {
                let vcpu = self.vcpu_on(cpu);
                self.past[vcpu].pending = None;
                self.verdict(config, cpu, vcpu, SPLIT_LOCK, before)?;
            }
            Op::Legacy(cpu) => self.verdict(config, cpu, self.vcpu_on(cpu), LEGACY, before)?,
            Op::Bogus(cpu) => self.verdict(config, cpu, self.vcpu_on(cpu), SPLIT_LOCK, before)?,
            Op::StepBegin(cpu) => {
                self.steps[cpu] = config.warns(cpu);
                let (result, written) =
                    self.on(config, cpu, |here, _, _| crate::step_begin(here))?;
                self.check_written(&written, result, Why::Step)?;
            }
            Op::StepEnd(cpu) => {
                let (result, written) = self.on(config, cpu, |here, _, _| crate::step_end(here))?;
                self.check_written(&written, result, Why::Step)?;
                self.steps[cpu] = false;
            }
        }
        Ok(())
    }

    fn vcpu_on(&self, cpu: usize) -> usize {
        match self.running[cpu] {
            Some(Runs::Vcpu(vcpu)) => vcpu,
            other => unreachable!("{other:?}"),
        }
    }

    /// The virtual MSR now holds `value`, by an operation on the CPU that runs it or (`here`
    /// false) another.
    fn changed(
        &mut self,
        vcpu: usize,
        value: u64,
        here: bool,
        written: &[u64],
    ) -> Result<(), Broken> {
        let past = &mut self.past[vcpu];
        let propagates = here && past.loaded;
        ensure!(propagates || written.is_empty(), LOADED_HERE, "wrote {written:x?}");
        past.stale = past.loaded && !here && (past.stale || value != past.virtual_msr);
        past.virtual_msr = value;
        Ok(())
    }

    fn verdict(
        &mut self,
        config: &Config<C, V>,
        cpu: usize,
        vcpu: usize,
        ac: AcContext,
        before: &Self,
    ) -> Result<(), Broken> {
        let (result, written) = self.on(config, cpu, |here, tasks, vcpus| {
            vcpus[vcpu].on_ac(here, &mut tasks.vcpu[vcpu], ac)
        })?;
        let verdict = no_fault(result)?;

        let kind = config.kind(cpu);
        let policy = self.past[vcpu].policy;
        let guests_own = config.exposed(vcpu) && self.past[vcpu].virtual_msr & BIT != 0;
        let expected: &[_] = if !kind.readable() || ac == LEGACY {
            &["inject"]
        } else if !kind.works() || config.mode == SldMode::Off {
            &["kill-bogus"]
        } else if guests_own {
            &["inject"]
        } else {
            match policy {
                Policy::Off | Policy::Warn => &["warn", "step"],
                Policy::Step => &["step"],
                Policy::Emulate => &["emulate"],
                Policy::RateLimit(_) => &["throttle"],
                Policy::Fatal => &["kill"],
            }
        };
        let name = verdict.as_str();
        ensure!(expected.contains(&name), VERDICT, "{verdict:?}, not {expected:?}");

        let flag = before.tasks.vcpu[vcpu].disabled;
        let siblings = self.siblings(config, cpu).count();
        let passes = matches!(policy, Policy::Off | Policy::Warn);
        let (first, real_bit) = match verdict {
            Verdict::Warn { first, real_bit } => {
                ensure!(!self.bit(config, cpu), PROGRESS, "resumed with the bit on");
                ensure!(!self.core_steps(config, cpu), PROGRESS, "a step's end may undo it");
                ensure!(!flag || siblings == 0, PROGRESS, "a sibling may undo it forever");
                (first, real_bit)
            }
            Verdict::Step { first } => {
                ensure!(!passes || siblings > 0, PROGRESS, "a step that nobody needs");
                (first, None)
            }
            Verdict::Emulate { first, fallback } => {
                let can_step = config.mode == SldMode::Warn;
                ensure!((fallback == Fallback::Step) == can_step, PROGRESS, "{verdict:?}");
                (first, None)
            }
            Verdict::Throttle { first, limit } => {
                ensure!(Policy::RateLimit(limit) == policy, VERDICT, "{verdict:?}");
                (first, None)
            }
            Verdict::Inject | Verdict::Kill | Verdict::KillBogus => {
                ensure!(written.is_empty(), VERDICT, "{verdict:?} and wrote {written:x?}");
                ensure!(self.tasks == before.tasks, VERDICT, "{verdict:?} changed a task");
                self.past[vcpu].dead = verdict != Verdict::Inject;
                return Ok(());
            }
        };
        self.check_written(&written, Ok(real_bit), Why::Warn)?;
        let now = self.tasks.vcpu[vcpu].disabled;
        ensure!(now == (flag || passes), VERDICT, "{verdict:?} and left the flag {now}");
        let past = &mut self.past[vcpu];
        ensure!(first == (!past.warned && policy != Policy::Off), WARN_ONCE, "{verdict:?}");
        past.warned |= first;
        past.warned_since_load |= past.loaded && passes;
        Ok(())
    }

    fn set_policy(
        &mut self,
        config: &Config<C, V>,
        cpu: usize,
        policy: Policy,
        before: &Self,
    ) -> Result<(), Broken> {
        let vcpu = self.vcpu_on(cpu);
        let (result, written) = self.on(config, cpu, |here, tasks, vcpus| {
            vcpus[vcpu].set_policy(here, &mut tasks.vcpu[vcpu], policy)
        })?;
        let result = match result {
            Ok(result) if config.keeps(policy) => result,
            Err(error) if !config.keeps(policy) => {
                let expected = PolicyError { host: config.mode, vm: policy };
                ensure!(error == expected, POLICY, "refused as {error}");
                ensure!(self == before, POLICY, "refused {policy}, and changed something");
                return Ok(());
            }
            result => {
                ensure!(false, POLICY, "{policy}: {result:?}");
                return Ok(());
            }
        };
        self.check_written(&written, result, Why::Policy)?;
        let past = &mut self.past[vcpu];
        past.policy = policy;
        past.flag_at_load = past.loaded && config.unloaded_flag(policy);
        past.warned_since_load = false;
        past.warned = false;
        past.stale = false;
        self.check_start_over(config, cpu, vcpu, policy, before)
    }

    /// After a change of policy: what has come out is what a new task and a new vCPU, with the
    /// guest's MSR as it is, would have come to.
    fn check_start_over(
        &self,
        config: &Config<C, V>,
        cpu: usize,
        vcpu: usize,
        policy: Policy,
        before: &Self,
    ) -> Result<(), Broken> {
        let config = Config { writes_fault: false, ..config.clone() };
        let Past { virtual_msr, loaded, .. } = self.past[vcpu];
        let vm = config.vm(vcpu, policy);
        let mut new = before.clone();
        new.tasks.vcpu[vcpu] = Task::of_vcpu(vcpu as u32, vm);
        new.vcpus[vcpu] = Vcpu::new(vm);
        let (result, _) = new.on(&config, cpu, |here, tasks, vcpus| {
            let (task, vcpu) = (&mut tasks.vcpu[vcpu], &mut vcpus[vcpu]);
            crate::task_switch(here, task)?;
            let _ = vcpu.host_write(here, task, virtual_msr)?;
            if loaded { vcpu.load(here, task) } else { Ok(None) }
        })?;
        no_fault(result)?;
        let same = self.tasks == new.tasks
            && self.cpus == new.cpus
            && self.cores == new.cores
            && self.msrs == new.msrs
            // What an unloaded one keeps of its last load says nothing.
            && (!loaded || self.vcpus == new.vcpus);
        ensure!(same, START_OVER, "{policy}, vcpu {vcpu}");
        Ok(())
    }

    /// An accepted or refused write of a virtual MSR, except for what it means to the vCPU.
    fn check_write(
        &self,
        config: &Config<C, V>,
        vcpu: usize,
        accepted: bool,
        written: &[u64],
        result: Result<MsrWrite, MsrFault>,
    ) -> Result<(), Broken> {
        let result = no_fault(result)?;
        ensure!((result == MsrWrite::Gp) != accepted, MASKED, "{result:?}");
        let real_bit = match result {
            MsrWrite::Gp | MsrWrite::Stored => None,
            MsrWrite::Propagated(real_bit) => Some(real_bit),
        };
        if config.mode == SldMode::Fatal || sees_all(self.past[vcpu].policy) {
            ensure!(written.is_empty(), STORES, "wrote {written:x?}");
        }
        self.check_written(written, Ok(real_bit), Why::GuestWrite)
    }

    fn check_written(
        &self,
        written: &[u64],
        result: Result<Option<RealBit>, MsrFault>,
        why: Why,
    ) -> Result<(), Broken> {
        let real_bit = no_fault(result)?;
        ensure!(written.len() <= 1, ONE_WRITE, "wrote {written:x?}");
        self.check_report(written, real_bit, why)
    }

    fn check_report(
        &self,
        written: &[u64],
        real_bit: Option<RealBit>,
        why: Why,
    ) -> Result<(), Broken> {
        let expected = written.last().map(|value| RealBit { on: value & BIT != 0, why });
        ensure!(real_bit == expected, REPORTED, "reported {real_bit:?}, wrote {expected:?}");
        Ok(())
    }

    /// What is not the operation's business is as it was.
    fn check_isolation(&self, config: &Config<C, V>, op: Op, before: &Self) -> Result<(), Broken> {
        let (cpu, vcpu) = match op {
            Op::Online(cpu)
            | Op::Offline(cpu)
            | Op::Switch(cpu, _)
            | Op::StepBegin(cpu)
            | Op::StepEnd(cpu) => (cpu, None),
            Op::HostWrite(cpu, vcpu, _) => (cpu, Some(vcpu)),
            Op::Load(cpu)
            | Op::Put(cpu)
            | Op::GuestWrite(cpu, ..)
            | Op::Reset(cpu)
            | Op::SetPolicy(cpu, _)
            | Op::SplitLock(cpu)
            | Op::Verdict(cpu)
            | Op::Legacy(cpu)
            | Op::Bogus(cpu) => (cpu, Some(before.vcpu_on(cpu))),
        };
        // A task changes only by what its own vCPU does.
        let task = vcpu.filter(|&vcpu| before.running[cpu] == Some(Runs::Vcpu(vcpu)));
        for other in 0..V {
            let same = self.tasks.vcpu[other] == before.tasks.vcpu[other];
            ensure!(same || task == Some(other), ISOLATION, "task of vcpu {other}");
            let same = self.vcpus[other] == before.vcpus[other];
            ensure!(same || vcpu == Some(other), ISOLATION, "vcpu {other}");
        }
        ensure!(self.tasks.idle == before.tasks.idle, ISOLATION, "an idle task");
        for other in (0..C).filter(|&other| other != cpu) {
            ensure!(self.cpus[other] == before.cpus[other], ISOLATION, "cpu {other}");
            if config.core_of[other] != config.core_of[cpu] {
                let same = self.bit(config, other) == before.bit(config, other);
                ensure!(same, ISOLATION, "real bit of cpu {other}");
            }
        }
        Ok(())
    }

    /// What must hold whenever no operation is under way.
    pub fn check_state(&self, config: &Config<C, V>) -> Result<(), Broken> {
        for index in 0..C {
            self.check_core(config, index)?;
        }
        for cpu in 0..C {
            if let Some(runs) = self.running[cpu] {
                self.check_cpu(config, cpu, runs)?;
                self.check_verify(config, cpu, runs)?;
            }
        }
        for vcpu in 0..V {
            let state = &self.vcpus[vcpu];
            let past = &self.past[vcpu];
            let told = config.exposed(vcpu);
            let read = (state.guest_rdmsr(Msr::TestCtrl), state.guest_rdmsr(Msr::CoreCapabilities));
            let expected = (Some(past.virtual_msr), told.then_some(0x20));
            ensure!(read == expected, READ_BACK, "vcpu {vcpu} reads {read:x?}");
            ensure!(state.vm().exposed() == told, READ_BACK, "vcpu {vcpu} exposed");
            let policy = state.vm().policy();
            ensure!(policy == past.policy, POLICY, "vcpu {vcpu} has {policy}");
            if config.mode != SldMode::Warn {
                ensure!(!self.tasks.vcpu[vcpu].disabled, NO_FLAG, "task of vcpu {vcpu}");
            }
        }
        Ok(())
    }

    fn check_core(&self, config: &Config<C, V>, index: usize) -> Result<(), Broken> {
        let mut threads = 0;
        let mut flags = 0;
        for cpu in (0..C).filter(|&cpu| config.core_of[cpu] == index) {
            if let Some(runs) = self.running[cpu] {
                threads += 1;
                flags += u32::from(self.flag(cpu, runs));
            }
        }
        let msr = self.msrs[index];
        ensure!(self.cores[index] & LOCKED == 0, CRITICAL_SECTION, "left locked");
        if threads == 0 || !config.kinds[index].works() {
            ensure!(msr == config.boot_value(), BOOT_VALUE, "core {index}: {msr:#x}");
            return Ok(());
        }
        let on = msr & BIT != 0;
        if (0..C).any(|cpu| self.steps[cpu] && config.core_of[cpu] == index) {
            ensure!(!on, STEP, "core {index}");
            return Ok(());
        }
        match config.mode {
            SldMode::Off => ensure!(!on, OFF, "core {index}"),
            SldMode::Warn => {
                ensure!(on == (flags < threads), WARN, "core {index}: {on}, {flags} of {threads}")
            }
            SldMode::Fatal => ensure!(on, FATAL, "core {index}"),
        }
        Ok(())
    }

    fn check_verify(&self, config: &Config<C, V>, cpu: usize, runs: Runs) -> Result<(), Broken> {
        let mut after = self.clone();
        let result = after.verify(config, cpu, runs)?;
        ensure!(result == Ok(()), VERIFY, "cpu {cpu}: {result:?}");
        ensure!(after == *self, VERIFY, "cpu {cpu}");
        Ok(())
    }

    /// What `verify` says of this CPU.
    pub(super) fn verify(
        &mut self,
        config: &Config<C, V>,
        cpu: usize,
        runs: Runs,
    ) -> Result<Result<(), Violation>, Broken> {
        let (result, _) =
            self.on(config, cpu, |here, tasks, _| crate::verify(here, tasks.run_by(cpu, runs)))?;
        Ok(result)
    }

    fn check_cpu(&self, config: &Config<C, V>, cpu: usize, runs: Runs) -> Result<(), Broken> {
        let works = config.kind(cpu).works();
        let expected = if works { config.mode } else { SldMode::Off };
        let mode = self.cpus[cpu].mode();
        ensure!(mode == expected, PROBED, "cpu {cpu} runs as {mode}");
        if mode != SldMode::Warn {
            return Ok(());
        }
        let flag = self.flag(cpu, runs);
        ensure!(self.cpus[cpu].disabled == flag, MIRROR, "cpu {cpu}");

        let Runs::Vcpu(vcpu) = runs else { return Ok(()) };
        if self.core_steps(config, cpu) {
            return Ok(());
        }
        let past = &self.past[vcpu];
        let on = self.bit(config, cpu);
        let forbidden = self.siblings(config, cpu).any(|(other, runs)| !self.flag(other, runs));
        if sees_all(past.policy) {
            ensure!(on || !past.loaded, SEES_ALL, "cpu {cpu}, vcpu {vcpu}");
        } else if !config.exposed(vcpu) {
            if past.policy == Policy::Off {
                ensure!(on == forbidden, VM_OFF, "cpu {cpu}, vcpu {vcpu} has {on}");
            } else {
                ensure!(on || past.warned, UNAWARE, "cpu {cpu}, vcpu {vcpu}");
            }
        } else if past.loaded && !past.stale {
            let wrote = past.virtual_msr & BIT != 0;
            let sees = on == wrote || (on && forbidden);
            ensure!(sees, GUEST_SEES, "cpu {cpu}, vcpu {vcpu} wrote {wrote}, has {on}");
        }
        Ok(())
    }
}

/// Whether a VM with this policy is to have no split lock that is not its own and goes unseen.
pub fn sees_all(policy: Policy) -> bool {
    [Policy::Step, Policy::Emulate, LIMIT, Policy::Fatal].contains(&policy)
}

fn no_fault<T>(result: Result<T, MsrFault>) -> Result<T, Broken> {
    result.map_err(|MsrFault| Broken { invariant: NO_FAULT, detail: String::new() })
}
