//! The VMs of the run: what each is made of, and the one that there is of it now.

use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use spin::{Mutex, Once};

use crate::config::VmConfig;
use crate::counters::Counters;
use crate::events;
use crate::percpu::{self, MAX_CPUS, PerCpu};
use crate::summary;
use crate::task::VcpuTask;
use crate::vm::{Factory, Plan, Reason, StartError, Vm};

static FLEET: Once<Fleet> = Once::new();
/// The first number that no vCPU has.
static NEXT_VCPU: AtomicUsize = AtomicUsize::new(0);

struct Fleet {
    factory: Factory<'static>,
    places: Vec<Place>,
}

/// What a VM is made of, and where it is while there is one. It can be made again when nothing is left
/// of the one before.
pub struct Place {
    /// As the file says.
    pub config: &'static VmConfig,
    /// The first of its vCPUs' numbers, once it was started: they are its own from then on.
    first: Once<usize>,
    vm: Mutex<Weak<Vm>>,
    /// Nothing is left of the VM: its vCPUs are gone, its memory is free.
    vacant: AtomicBool,
    runs: AtomicU32,
    last: Mutex<Option<Last>>,
}

/// How a VM has ended.
#[derive(Debug, Clone)]
pub struct Last {
    /// Why.
    pub reason: Reason,
    /// What its vCPUs have counted.
    pub counters: Counters,
}

/// A VM's hold on its place: the last thing that is dropped of it.
pub struct Seat(&'static Place);

impl Seat {
    /// The VM has ended like this.
    pub fn set_last(&self, last: Last) {
        *self.0.last.lock() = Some(last);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.vacant.store(true, Ordering::Release);
    }
}

/// Says what VMs there can be. Later calls do nothing.
pub fn initialize(factory: Factory<'static>, configs: &'static [VmConfig]) {
    let place = |config| Place {
        config,
        first: Once::new(),
        vm: Mutex::new(Weak::new()),
        vacant: AtomicBool::new(true),
        runs: AtomicU32::new(0),
        last: Mutex::new(None),
    };
    FLEET.call_once(|| Fleet { factory, places: configs.iter().map(place).collect() });
}

/// All VMs, in the file's order.
pub fn places() -> &'static [Place] {
    FLEET.get().map_or(&[], |fleet| &fleet.places)
}

/// The VM with this name.
pub fn find(name: &str) -> Option<(usize, &'static Place)> {
    (0..).zip(places()).find(|(_, place)| place.config.name == name)
}

impl Place {
    /// The VM, while there is one. It may be over.
    pub fn vm(&self) -> Option<Arc<Vm>> {
        self.vm.lock().upgrade()
    }

    /// The VM, unless it is over.
    pub fn running(&self) -> Option<Arc<Vm>> {
        self.vm().filter(|vm| !vm.is_over())
    }

    /// Whether nothing is left of it.
    pub fn is_vacant(&self) -> bool {
        self.vacant.load(Ordering::Acquire)
    }

    /// How often it was started.
    pub fn runs(&self) -> u32 {
        self.runs.load(Ordering::Relaxed)
    }

    /// How it has ended the last time.
    pub fn last(&self) -> Option<Last> {
        self.last.lock().clone()
    }

    /// Whether an operator has ended it.
    pub fn was_stopped(&self) -> bool {
        self.last.lock().as_ref().is_some_and(|last| last.reason == Reason::Stopped)
    }

    /// The first number that its vCPUs have or can have.
    pub fn first_vcpu(&self) -> usize {
        self.first.get().copied().unwrap_or_else(|| NEXT_VCPU.load(Ordering::Relaxed))
    }

    /// Begins to make the VM. By the boot CPU only; the place is vacant.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn plan(&'static self) -> Result<Plan, StartError> {
        let fleet = FLEET.get().expect("a place is a fleet's");
        fleet.factory.plan(self.config, self.first_vcpu())
    }

    /// Makes the VM, says so, and gives each of its vCPUs to `send`, for the CPU that has the least to
    /// do by `loads`. By the boot CPU only; the place is vacant, and the plan is filled.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is left behind.
    pub fn start(
        &'static self,
        plan: Plan,
        loads: &mut [u64; MAX_CPUS],
        mut send: impl FnMut(Box<VcpuTask>, &'static PerCpu),
    ) -> Result<(), StartError> {
        let fleet = FLEET.get().expect("a place is a fleet's");
        // Taken back when the seat is dropped, with the VM or without.
        self.vacant.store(false, Ordering::Release);
        let (vm, tasks) = fleet.factory.build(self.config, plan, Seat(self))?;
        self.first.call_once(|| NEXT_VCPU.fetch_add(tasks.len(), Ordering::Relaxed));
        *self.last.lock() = None;
        *self.vm.lock() = Arc::downgrade(&vm);
        self.runs.fetch_add(1, Ordering::Relaxed);
        let (name, bytes, policy, source) = (vm.name, vm.memory.len(), vm.policy(), vm.source);
        let mib = bytes >> 20;
        if source == fleet.factory.domains.default_source() {
            log::info!("VM {name}: {mib} MiB, policy {}", policy.policy());
        } else {
            log::info!("VM {name}: {mib} MiB, policy {}, source {source}", policy.policy());
        }
        events::write(percpu::stamp(), "vm-start", |json| {
            json.text("vm", name)?;
            json.text("policy", policy.policy())?;
            json.text("source", source)?;
            json.flag("exposed", policy.exposed())?;
            json.number("vcpus", vm.placement.vcpus)?;
            json.number("weight", vm.placement.weight)?;
            json.number("memory_bytes", bytes)
        });
        summary::started(name, policy.policy(), vm.placement.vcpus);
        for task in tasks {
            let allowed = percpu::all(percpu::online() & vm.placement.cpus);
            let least = allowed.min_by_key(|cpu: &&PerCpu| loads[cpu.index as usize]);
            let cpu = least.expect("a placement names CPUs that are online");
            loads[cpu.index as usize] += u64::from(vm.placement.weight);
            send(Box::new(task), cpu);
        }
        Ok(())
    }

    /// Says why the VM cannot start.
    pub fn refuse(&self, why: &StartError) {
        let name = self.config.name.as_str();
        log::error!("VM {name} cannot start: {why}");
        events::write(percpu::stamp(), "vm-refused", |json| {
            json.text("vm", name)?;
            json.text("why", why)
        });
    }
}
