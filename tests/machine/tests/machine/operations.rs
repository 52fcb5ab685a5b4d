//! The operations on the real bit, as a table of who may write it when and with what, against which
//! a run's events are replayed. Written apart from `sld`, from what the operations are to do:
//!
//! | operation | writes |
//! |---|---|
//! | boot | on, except in mode `off` |
//! | task switch | the next task's flag, if the previous one's differs |
//! | load | the guest's wish |
//! | put | the flag with which its task came |
//! | guest write | the guest's wish |
//! | warn | off, and the task's flag with it |
//! | offline | what it was before boot |
//!
//! A wish counts in mode `warn` only, and only of a VM that knows of detection; a VM whose policy is
//! `fatal` wishes it on. Whatever would write what the bit is already writes nothing: such an
//! operation leaves no event, and is found between two that do.

use std::collections::BTreeMap;

use xtask::events::{Ac, Address, Body, Event};

/// The bit in MSR 0x33.
const BIT_29: u64 = 1 << 29;

/// What a run's events came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Writes of the real bit by reason.
    pub writes: BTreeMap<String, usize>,
}

/// Replays the events of a run, in order, on CPUs of which no two are threads of one core and whose
/// bits were off before boot. No guest resets its vCPUs once they have written MSR 0x33. Every write
/// must be due, and every write that is due must be there.
///
/// # Errors
/// The first event that should not be, or before which one is missing.
pub fn replay(events: &[Event]) -> Result<Summary, String> {
    let mut machine = Machine::default();
    let mut summary = Summary::default();
    for event in events {
        let place =
            |why| format!("CPU {}, event {}, {:?}: {why}", event.cpu, event.seq, event.body);
        machine.event(event.cpu, &event.body).map_err(place)?;
        if let Body::RealBit { why, .. } = &event.body {
            *summary.writes.entry(why.clone()).or_default() += 1;
        }
    }
    if machine.over { Ok(summary) } else { Err("the run has no end".to_owned()) }
}

/// A VM.
struct Vm {
    exposed: bool,
    fatal: bool,
}

/// A vCPU: its VM's name and its index in it.
type Id = (String, u32);

/// A vCPU and its task.
#[derive(Default)]
struct Vcpu {
    /// Bit 29 as the guest has it.
    bit: bool,
    /// SLD_DISABLED of its task.
    disabled: bool,
    /// The same when it was loaded.
    came_disabled: bool,
    /// The CPU that runs its task, or did so last.
    cpu: Option<u32>,
}

/// A CPU. Everything is off and nothing runs before boot.
#[derive(Default)]
struct Cpu {
    /// The real bit.
    on: bool,
    booted: bool,
    /// SLD_DISABLED of the task that runs.
    disabled: bool,
    /// The vCPU whose task runs; none is the idle task, or one that is not known.
    task: Option<Id>,
    /// Whether that vCPU is loaded.
    loaded: bool,
    /// The write that must follow at once: vCPU, reason, value.
    due: Option<(Id, &'static str, bool)>,
}

/// The machine.
#[derive(Default)]
struct Machine {
    /// The host's mode, from boot on.
    mode: String,
    cpus: BTreeMap<u32, Cpu>,
    vms: BTreeMap<String, Vm>,
    vcpus: BTreeMap<Id, Vcpu>,
    over: bool,
}

/// A write of the real bit, if there is one.
type Write = Option<bool>;

impl Machine {
    fn event(&mut self, cpu: u32, body: &Body) -> Result<(), String> {
        if let Some(((vm, vcpu), why, on)) = self.cpu(cpu).due.take() {
            let due = Body::RealBit { vm: Some(vm), vcpu: Some(vcpu), on, why: why.to_owned() };
            return if *body == due { Ok(()) } else { Err(format!("{due:?} is missing before")) };
        }
        match body {
            Body::Boot { sld, .. } => self.mode.clone_from(sld),
            Body::VmStart { vm, policy, exposed, vcpus, .. } => {
                let state = Vm { exposed: *exposed, fatal: policy == "fatal" };
                ensure(self.vms.insert(vm.clone(), state).is_none(), "it has started already")?;
                let ids = (0..*vcpus).map(|index| (vm.clone(), index));
                self.vcpus.extend(ids.map(|id| (id, Vcpu::default())));
            }
            Body::RealBit { vm, vcpu, on, why } => {
                let Cpu { on: before, booted, .. } = *self.cpu(cpu);
                ensure(before != *on || !booted, "the bit has that value")?;
                let vcpu = vm.clone().zip(*vcpu);
                let write = self.real_bit(cpu, vcpu.as_ref(), why)?;
                ensure(write == Some(*on), &format!("what is due is {write:?}"))?;
            }
            Body::TestCtrlWrite { vm, vcpu, value, result } => {
                let id = (vm.clone(), *vcpu);
                self.reach_vcpu(cpu, &id)?;
                let expected = self.guest_write(cpu, &id, *value);
                ensure(result == expected, &format!("the result should be {expected}"))?;
            }
            Body::Ac(ac) => self.ac(cpu, ac)?,
            Body::VcpuEnd { vm, vcpu, .. } => {
                let id = (vm.clone(), *vcpu);
                self.forget(&id)?;
                self.vcpus.remove(&id).ok_or("no such vCPU runs")?;
            }
            Body::VmEnd { vm, .. } => {
                ensure(self.vcpus.keys().all(|(of, _)| of != vm), "a vCPU of it has no end")?;
                self.vms.remove(vm).ok_or("no such VM runs")?;
            }
            Body::Shutdown { .. } => {
                ensure(self.cpus.values().all(|cpu| !cpu.on), "a bit is not as before boot")?;
                ensure(self.vms.is_empty(), "a VM has no end")?;
                self.over = true;
            }
            _ => {}
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: u32) -> &mut Cpu {
        self.cpus.entry(cpu).or_default()
    }

    /// What is to be written for this reason, other than what is due after another event.
    fn real_bit(&mut self, cpu: u32, vcpu: Option<&Id>, why: &str) -> Result<Write, String> {
        let on = self.mode != "off";
        match (why, vcpu) {
            ("boot", None) if !self.cpu(cpu).booted => {
                let cpu = self.cpu(cpu);
                (cpu.booted, cpu.on) = (true, on);
                Ok(Some(on))
            }
            ("task-switch", next) => {
                self.unload(cpu)?;
                self.switch(cpu, next)
            }
            ("load", Some(vcpu)) => {
                self.unload(cpu)?;
                self.reach_task(cpu, Some(vcpu))?;
                Ok(self.load(cpu, vcpu))
            }
            ("put", Some(vcpu)) => {
                self.reach_vcpu(cpu, vcpu)?;
                Ok(self.put(cpu, vcpu))
            }
            ("offline", None) => {
                self.reach_task(cpu, None)?;
                Ok(self.write(cpu, false))
            }
            _ => Err("nothing gives reason to it".to_owned()),
        }
    }

    fn ac(&mut self, cpu: u32, ac: &Ac) -> Result<(), String> {
        let id = (ac.vm.clone(), ac.vcpu);
        self.reach_vcpu(cpu, &id)?;
        ensure(self.cpu(cpu).on || ac.legacy, "the bit is off")?;
        let bit = self.vcpu(&id).bit;
        ensure(ac.virtual_bit == bit, "the guest's bit is another")?;
        if ac.verdict == "warn" {
            let write = self.set_disabled(cpu, &id, true);
            self.cpu(cpu).due = write.map(|on| (id, "warn", on));
        }
        Ok(())
    }

    // ---- Operations: each says what it writes. -------------------------------------------------

    fn write(&mut self, cpu: u32, on: bool) -> Write {
        let cpu = self.cpu(cpu);
        let differs = cpu.on != on;
        cpu.on = on;
        differs.then_some(on)
    }

    /// The flag of the task that runs, and the bit with it.
    fn set_disabled(&mut self, cpu: u32, id: &Id, disabled: bool) -> Write {
        self.vcpu(id).disabled = disabled;
        self.cpu(cpu).disabled = disabled;
        self.write(cpu, !disabled)
    }

    /// A vCPU that [`Self::reach_task`] has found.
    fn vcpu(&mut self, id: &Id) -> &mut Vcpu {
        self.vcpus.get_mut(id).expect("its task runs")
    }

    fn switch(&mut self, cpu: u32, next: Option<&Id>) -> Result<Write, String> {
        let disabled = match next {
            None => false,
            Some(id) => {
                self.forget(id)?;
                let vcpu = self.vcpus.get_mut(id).ok_or("no such vCPU runs")?;
                vcpu.cpu = Some(cpu);
                vcpu.disabled
            }
        };
        let state = self.cpu(cpu);
        state.task = next.cloned();
        let differs = state.disabled != disabled;
        state.disabled = disabled;
        Ok(if differs { self.write(cpu, !disabled) } else { None })
    }

    fn update(&mut self, cpu: u32, id: &Id, on: bool) -> Write {
        let vm = &self.vms[&id.0];
        let heard = vm.exposed || vm.fatal;
        if self.mode != "warn" || !heard || self.cpu(cpu).on == on {
            return None;
        }
        self.set_disabled(cpu, id, !on)
    }

    /// Whether detection is to be on while it runs, as far as it is asked.
    fn wish(&self, id: &Id) -> bool {
        self.vms[&id.0].fatal || self.vcpus[id].bit
    }

    fn load(&mut self, cpu: u32, id: &Id) -> Write {
        self.cpu(cpu).loaded = true;
        let vcpu = self.vcpu(id);
        vcpu.came_disabled = vcpu.disabled;
        let wish = self.wish(id);
        self.update(cpu, id, wish)
    }

    fn put(&mut self, cpu: u32, id: &Id) -> Write {
        self.cpu(cpu).loaded = false;
        let on = !self.vcpu(id).came_disabled;
        self.update(cpu, id, on)
    }

    fn guest_write(&mut self, cpu: u32, id: &Id, Address(value): Address) -> &'static str {
        let valid = if self.vms[&id.0].exposed { BIT_29 } else { 0 };
        if value & !valid != 0 {
            return "gp";
        }
        self.vcpu(id).bit = value != 0;
        let wish = self.wish(id);
        let write = self.update(cpu, id, wish);
        let due = write.map(|on| (id.clone(), "guest-write", on));
        let result = if due.is_some() { "propagated" } else { "stored" };
        self.cpu(cpu).due = due;
        result
    }

    // ---- Operations that write nothing and have no event. --------------------------------------

    fn unload(&mut self, cpu: u32) -> Result<(), String> {
        let write = match self.cpu(cpu) {
            Cpu { task: Some(id), loaded: true, .. } => {
                let id = id.clone();
                self.put(cpu, &id)
            }
            _ => None,
        };
        silent("put", cpu, write)
    }

    /// The vCPU has left the CPU where it was, which runs something else.
    fn forget(&mut self, id: &Id) -> Result<(), String> {
        let before = self.vcpus.get_mut(id).and_then(|vcpu| vcpu.cpu.take());
        if let Some(cpu) = before
            && self.cpu(cpu).task.as_ref() == Some(id)
        {
            self.unload(cpu)?;
            self.cpu(cpu).task = None;
        }
        Ok(())
    }

    fn reach_task(&mut self, cpu: u32, task: Option<&Id>) -> Result<(), String> {
        self.unload(cpu)?;
        let runs = task.is_some() && self.cpu(cpu).task.as_ref() == task;
        let write = if runs { None } else { self.switch(cpu, task)? };
        silent("task-switch", cpu, write)
    }

    fn reach_vcpu(&mut self, cpu: u32, id: &Id) -> Result<(), String> {
        let Cpu { loaded, task, .. } = self.cpu(cpu);
        if *loaded && task.as_ref() == Some(id) {
            return Ok(());
        }
        self.reach_task(cpu, Some(id))?;
        let write = self.load(cpu, id);
        silent("load", cpu, write)
    }
}

fn silent(operation: &str, cpu: u32, write: Write) -> Result<(), String> {
    let missing = |on| Err(format!("{operation} on CPU {cpu} with {on} is missing before"));
    write.map_or(Ok(()), missing)
}

fn ensure(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}
