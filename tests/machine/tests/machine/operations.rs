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

/// Replays the events of a run on one CPU, whose bit was off before boot. Every write must be due,
/// and every write that is due must be there.
///
/// # Errors
/// The first event that should not be, or before which one is missing.
pub fn replay(events: &[Event]) -> Result<Summary, String> {
    let mut cpu = Cpu::default();
    let mut summary = Summary::default();
    for event in events {
        let place = |why| format!("event {}, {:?}: {why}", event.seq, event.body);
        cpu.event(&event.body).map_err(place)?;
        if let Body::RealBit { why, .. } = &event.body {
            *summary.writes.entry(why.clone()).or_default() += 1;
        }
    }
    if cpu.over { Ok(summary) } else { Err("the run has no end".to_owned()) }
}

/// A VM: one vCPU and its task.
#[derive(Default)]
struct Vm {
    exposed: bool,
    fatal: bool,
    /// Bit 29 as the guest has it.
    bit: bool,
    /// SLD_DISABLED of its task.
    disabled: bool,
    /// The same when it was loaded.
    came_disabled: bool,
}

impl Vm {
    /// Whether detection is to be on while it runs, as far as it is asked.
    fn wish(&self) -> bool {
        self.fatal || self.bit
    }
}

/// The CPU. Everything is off and nothing runs before boot.
#[derive(Default)]
struct Cpu {
    /// The host's mode, from boot on.
    mode: String,
    /// The real bit.
    on: bool,
    booted: bool,
    vms: BTreeMap<String, Vm>,
    /// The VM whose task runs; none is the idle task.
    task: Option<String>,
    /// Whether that VM's vCPU is loaded.
    loaded: bool,
    /// The write that must follow at once: VM, reason, value.
    due: Option<(String, &'static str, bool)>,
    over: bool,
}

/// A write of the real bit, if there is one.
type Write = Option<bool>;

impl Cpu {
    fn event(&mut self, body: &Body) -> Result<(), String> {
        if let Some((vm, why, on)) = self.due.take() {
            let due = Body::RealBit { vm: Some(vm), on, why: why.to_owned() };
            return if *body == due { Ok(()) } else { Err(format!("{due:?} is missing before")) };
        }
        match body {
            Body::Boot { sld, .. } => self.mode.clone_from(sld),
            Body::VmStart { vm, policy, exposed, .. } => {
                let (fatal, exposed) = (policy == "fatal", *exposed);
                let state = Vm { exposed, fatal, ..Vm::default() };
                ensure(self.vms.insert(vm.clone(), state).is_none(), "it has started already")?;
            }
            Body::RealBit { vm, on, why } => {
                ensure(self.on != *on || !self.booted, "the bit has that value")?;
                let write = self.real_bit(vm.as_deref(), why)?;
                ensure(write == Some(*on), &format!("what is due is {write:?}"))?;
            }
            Body::TestCtrlWrite { vm, value, result, .. } => {
                self.reach_vcpu(vm)?;
                let expected = self.guest_write(vm, *value);
                ensure(result == expected, &format!("the result should be {expected}"))?;
            }
            Body::Ac(ac) => self.ac(ac)?,
            Body::VmEnd { vm, .. } => {
                self.reach_task(None)?;
                self.vms.remove(vm).ok_or("no such VM runs")?;
            }
            Body::Shutdown { .. } => {
                self.reach_task(None)?;
                ensure(!self.on, "the bit is not as before boot")?;
                ensure(self.vms.is_empty(), "a VM has no end")?;
                self.over = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// What is to be written for this reason, other than what is due after another event.
    fn real_bit(&mut self, vm: Option<&str>, why: &str) -> Result<Write, String> {
        match (why, vm) {
            ("boot", None) if !self.booted => {
                self.booted = true;
                self.on = self.mode != "off";
                Ok(Some(self.on))
            }
            ("task-switch", next) => {
                self.unload()?;
                self.switch(next)
            }
            ("load", Some(vm)) => {
                self.unload()?;
                self.reach_task(Some(vm))?;
                Ok(self.load())
            }
            ("put", Some(vm)) => {
                self.reach_vcpu(vm)?;
                Ok(self.put())
            }
            ("offline", None) => {
                self.reach_task(None)?;
                Ok(self.write(false))
            }
            _ => Err("nothing gives reason to it".to_owned()),
        }
    }

    fn ac(&mut self, ac: &Ac) -> Result<(), String> {
        self.reach_vcpu(&ac.vm)?;
        ensure(self.on || ac.legacy, "the bit is off")?;
        let bit = self.running().bit;
        ensure(ac.virtual_bit == bit, "the guest's bit is another")?;
        if ac.verdict == "warn" {
            self.running().disabled = true;
            self.due = self.write(false).map(|on| (ac.vm.clone(), "warn", on));
        }
        Ok(())
    }

    // ---- Operations: each says what it writes. -------------------------------------------------

    fn write(&mut self, on: bool) -> Write {
        let differs = self.on != on;
        self.on = on;
        differs.then_some(on)
    }

    /// The VM whose task runs.
    fn running(&mut self) -> &mut Vm {
        self.task.as_ref().and_then(|vm| self.vms.get_mut(vm)).expect("a VM's task runs")
    }

    fn switch(&mut self, next: Option<&str>) -> Result<Write, String> {
        let disabled = |task: Option<&str>| match task {
            None => Ok(false),
            Some(vm) => self.vms.get(vm).map(|vm| vm.disabled).ok_or("no such VM runs"),
        };
        let (previous, next_disabled) = (disabled(self.task.as_deref())?, disabled(next)?);
        self.task = next.map(str::to_owned);
        Ok(if previous == next_disabled { None } else { self.write(!next_disabled) })
    }

    fn update(&mut self, on: bool) -> Write {
        let heard = self.running().exposed || self.running().fatal;
        if self.mode != "warn" || !heard || self.on == on {
            return None;
        }
        self.running().disabled = !on;
        self.write(on)
    }

    fn load(&mut self) -> Write {
        self.loaded = true;
        let vm = self.running();
        vm.came_disabled = vm.disabled;
        let wish = vm.wish();
        self.update(wish)
    }

    fn put(&mut self) -> Write {
        self.loaded = false;
        let on = !self.running().came_disabled;
        self.update(on)
    }

    fn guest_write(&mut self, name: &str, Address(value): Address) -> &'static str {
        let vm = self.running();
        let valid = if vm.exposed { BIT_29 } else { 0 };
        if value & !valid != 0 {
            return "gp";
        }
        vm.bit = value != 0;
        let wish = vm.wish();
        self.due = self.update(wish).map(|on| (name.to_owned(), "guest-write", on));
        if self.due.is_some() { "propagated" } else { "stored" }
    }

    // ---- Operations that write nothing and have no event. --------------------------------------

    fn unload(&mut self) -> Result<(), String> {
        let write = if self.loaded { self.put() } else { None };
        silent("put", &self.task, write)
    }

    fn reach_task(&mut self, task: Option<&str>) -> Result<(), String> {
        self.unload()?;
        let write = if self.task.as_deref() == task { None } else { self.switch(task)? };
        silent("task-switch", &self.task, write)
    }

    fn reach_vcpu(&mut self, vm: &str) -> Result<(), String> {
        if self.loaded && self.task.as_deref() == Some(vm) {
            return Ok(());
        }
        self.reach_task(Some(vm))?;
        let write = self.load();
        silent("load", &self.task, write)
    }
}

fn silent(operation: &str, task: &Option<String>, write: Write) -> Result<(), String> {
    let missing = |on| Err(format!("{operation} of {task:?} with {on} is missing before"));
    write.map_or(Ok(()), missing)
}

fn ensure(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}
