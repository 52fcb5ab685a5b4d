//! Bringing CPUs online: the boot CPU first, then, by it, one after the other, those that ACPI names.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use raw_cpuid::{CpuId, CpuIdReaderNative, TopologyType};
use sld::{Detection, Online};
use spin::Once;
use vmx::addr::HostPhysAddr;
use vmx::capability::Capabilities;
use vmx::cpuid::{CpuidTable, Offer};
use vmx::emulate;
use vmx::instruction::now;
use x86_64::PhysAddr;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::PhysFrame;

use crate::events::{self, Stamp};
use crate::gate::Gate;
use crate::hardware;
use crate::machine_check::Report;
use crate::mtrr::Mtrrs;
use crate::percpu::{self, Core, MAX_CPUS, PerCpu};
use crate::sched::{Cpu, Policy, SldCpu};
use crate::source::Wishes;
use crate::vm::MAX_VCPUS;
use crate::x86::apic::LocalApic;
use crate::x86::cpu::{self, NoVmx, Vmx};
use crate::x86::startup::Startup;
use crate::x86::{mca, stack};

/// Size of a CPU's stack in bytes.
const STACK_BYTES: u64 = 64 * 1024;
/// How long a started CPU may take to get ready, in ticks of the TSC.
const READY_WITHIN: u64 = 2_000_000_000;

/// What all CPUs must have alike, since vCPUs move between them.
struct Common {
    caps: Capabilities,
    cpuid: CpuidTable,
    detection: Detection,
    wishes: Wishes,
    policy: Policy,
    /// MTRRs. They may differ, if the firmware has made a mistake.
    mtrrs: Option<Mtrrs>,
    /// IA32_TSC_ADJUST.
    tsc_adjust: Option<u64>,
    /// CR3.
    root: u64,
}

/// Why a CPU is left out.
#[derive(Debug, Clone, Copy)]
enum LeftOut {
    /// It did not start.
    NoAnswer,
    /// There is no memory for its stacks.
    OutOfMemory,
    /// It has no VMX to use.
    NoVmx(NoVmx),
    /// The boot CPU's local APIC cannot send it anything.
    OutOfReach,
    /// Its VMX differs from the boot CPU's in this capability MSR, as far as that is used.
    OtherVmx(u32),
    /// Its CPUID differs from the boot CPU's in this leaf, as far as guests see it.
    OtherCpuid(u32),
    /// Its split-lock detection is not like the boot CPU's.
    OtherDetection(Detection),
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer => f.write_str("it does not answer INIT and SIPI"),
            Self::OutOfMemory => f.write_str("no memory is left for its stacks"),
            Self::NoVmx(why) => why.fmt(f),
            Self::OutOfReach => f.write_str(
                "the boot CPU's local APIC reaches IDs below 255 only; enable x2APIC in the firmware \
                 setup",
            ),
            Self::OtherVmx(number) => {
                write!(f, "its VMX capabilities are not the boot CPU's: MSR {number:#x} differs")
            }
            Self::OtherCpuid(leaf) => write!(
                f,
                "guests could not move to it from the boot CPU: CPUID leaf {leaf:#x} differs"
            ),
            Self::OtherDetection(Detection::Works) => {
                f.write_str("it detects split locks, which the boot CPU does not")
            }
            Self::OtherDetection(Detection::Absent) => {
                f.write_str("it does not detect split locks, as the boot CPU does")
            }
            Self::OtherDetection(Detection::Failed(failure)) => {
                write!(f, "its split-lock detection does not work: {failure}")
            }
        }
    }
}

/// What a CPU that is started gets.
struct Launch {
    shared: &'static PerCpu,
    common: &'static Common,
    /// The CPU is ready, or it was given up: who is first decides.
    decided: AtomicBool,
    answer: Once<Result<(), LeftOut>>,
}

/// Set when VMs are made, and CPUs may run them.
static GO: AtomicBool = AtomicBool::new(false);
/// CPUs other than the boot CPU that have left VMX operation.
static LEFT: AtomicU32 = AtomicU32::new(0);

/// The boot CPU, online.
pub struct BootCpu {
    /// What it keeps to itself.
    pub cpu: Cpu,
    /// Its capabilities, which are all CPUs'.
    pub caps: Capabilities,
    /// Its split-lock detection.
    pub detection: Detection,
    /// When it began.
    pub boot: Stamp,
    vmx: Vmx,
    cores: Vec<(&'static Core, u32)>,
    others: u32,
}

impl BootCpu {
    /// Brings the boot CPU online, on which this runs.
    ///
    /// # Errors
    ///
    /// [`NoVmx`].
    pub fn start(wishes: Wishes, policy: Policy) -> Result<Self, NoVmx> {
        let (segments, idt) = cpu::initialize().ok_or(NoVmx::OutOfMemory)?;
        let left_over = mca::start(true);
        let apic = LocalApic::start();
        let mut cores = Vec::new();
        let shared = make(0, apic.id(), &mut cores);
        shared.install();
        tell_left_over(shared, left_over);
        let vmx = cpu::enter_vmx(shared, &segments, idt)?;
        // Also where no VM is traced: instructions are emulated, and offenders measured.
        emulate::prepare();
        let boot = percpu::stamp();
        let mut sld = SldCpu::real(shared.core);
        let Online { detection, real_bit } = sld::online(&mut sld, wishes.real_mode());
        hardware::tell_detection(detection);
        let mut cpu = Cpu::new(shared, sld, vmx.host, apic, policy);
        cpu.note(Ok(real_bit));
        cpu.start_tracing(wishes.software_mode(detection));
        cpu.write_events();
        say_online(shared);
        Ok(Self { cpu, caps: vmx.caps, detection, boot, vmx, cores, others: 0 })
    }

    /// Starts the CPUs with these APIC IDs, as far as `limit` allows, its own left out. `page` is
    /// free and below 1 MiB.
    pub fn start_others(
        &mut self,
        apic_ids: &[u32],
        limit: usize,
        page: Option<HostPhysAddr>,
        (wishes, policy): (Wishes, Policy),
    ) {
        let own = self.cpu.shared.apic_id;
        let limit = limit.min(MAX_CPUS);
        let others: Vec<u32> = apic_ids.iter().copied().filter(|id| *id != own).collect();
        if others.len() >= limit {
            log::info!("{} of {} CPUs are used", limit, others.len() + 1);
        }
        let others = &others[..others.len().min(limit - 1)];
        if others.is_empty() {
            return;
        }
        let Some(startup) = page.and_then(|page| Startup::new(page).ok()) else {
            log::error!(
                "one CPU is used: no memory below 1 MiB is left for the others to start in"
            );
            return;
        };
        let common: &'static Common = Box::leak(Box::new(Common {
            caps: self.caps,
            cpuid: visible_cpuid(),
            detection: self.detection,
            wishes,
            policy,
            mtrrs: cpu::mtrrs(),
            tsc_adjust: cpu::tsc_adjust(),
            root: startup.kernel_root(),
        }));
        let mut all_answered = true;
        for apic_id in others {
            match self.start_one(&startup, *apic_id, common) {
                Ok(()) => self.others += 1,
                Err(why) => {
                    all_answered &= !matches!(why, LeftOut::NoAnswer);
                    log::warn!("the CPU with APIC ID {apic_id} is not used: {why}");
                    events::write(percpu::stamp(), "cpu-refused", |json| {
                        json.number("apic_id", *apic_id)?;
                        json.text("why", why)
                    });
                }
            }
        }
        if !all_answered {
            // One may still come, and use the tables.
            core::mem::forget(startup);
        }
    }

    fn start_one(
        &mut self,
        startup: &Startup,
        apic_id: u32,
        common: &'static Common,
    ) -> Result<(), LeftOut> {
        if !LocalApic::current().reaches(apic_id) {
            return Err(LeftOut::OutOfReach);
        }
        let stack = stack::allocate(STACK_BYTES).ok_or(LeftOut::OutOfMemory)?;
        // Its index is given for good only once it is online.
        let shared = make(self.others + 1, apic_id, &mut self.cores);
        let launch: &'static Launch = Box::leak(Box::new(Launch {
            shared,
            common,
            decided: AtomicBool::new(false),
            answer: Once::new(),
        }));
        let argument = &raw const *launch as u64;
        if !startup.start(LocalApic::current(), apic_id, stack, arrive, argument) {
            return Err(LeftOut::NoAnswer);
        }
        let start = now();
        loop {
            if let Some(answer) = launch.answer.get() {
                return *answer;
            }
            let late = now().wrapping_sub(start) >= READY_WITHIN;
            // If it was ready just before, its answer comes.
            if late && !launch.decided.swap(true, Ordering::AcqRel) {
                return Err(LeftOut::NoAnswer);
            }
            core::hint::spin_loop();
        }
    }

    /// Runs the VMs on all CPUs, until all are done with and the other CPUs have left.
    pub fn run(&mut self) {
        GO.store(true, Ordering::Release);
        percpu::all(percpu::online() & !1).for_each(|cpu| cpu.kick(LocalApic::current()));
        self.cpu.run();
        while LEFT.load(Ordering::Acquire) < self.others {
            core::hint::spin_loop();
        }
    }

    /// Takes the boot CPU out of VMX operation.
    pub fn leave(mut self) {
        leave(&mut self.cpu, self.vmx);
    }
}

/// A CPU that is not online, and its place in its core.
fn make(index: u32, apic_id: u32, cores: &mut Vec<(&'static Core, u32)>) -> &'static PerCpu {
    let id = apic_id >> thread_bits();
    let place = cores.iter().position(|(core, _)| core.id == id).unwrap_or_else(|| {
        let core = Core { id, sld: sld::Core::new(), gate: Gate::new() };
        cores.push((Box::leak(Box::new(core)), 0));
        cores.len() - 1
    });
    let (core, threads) = &mut cores[place];
    *threads += 1;
    let shared = PerCpu::new(index, apic_id, core, *threads - 1);
    shared.inbox.reserve(MAX_VCPUS);
    shared
}

/// How many bits of an APIC ID tell a core's threads apart: SDM volume 3, section "Hierarchical
/// Mapping of Shared Resources". CPUs without the leaf have no split-lock detection to share.
fn thread_bits() -> u32 {
    let levels = CpuId::with_cpuid_reader(CpuIdReaderNative).get_extended_topology_info();
    let mut levels = levels.into_iter().flatten();
    // Where a core has one thread, some emulators give a shift all the same.
    let threads =
        levels.find(|level| level.level_type() == TopologyType::SMT && level.processors() > 1);
    threads.map_or(0, |level| level.shift_right_for_next_apic_id())
}

/// What guests would see of this CPU, whichever it is.
fn visible_cpuid() -> CpuidTable {
    let offer = Offer { sld_exposed: true, rdtscp: true, invpcid: true, apic_id: 0, vcpus: 1 };
    CpuidTable::new(&CpuIdReaderNative, offer)
}

/// Tells that this CPU is online.
fn say_online(cpu: &'static PerCpu) {
    cpu.set_online();
    events::write(percpu::stamp(), "cpu-online", |json| {
        json.number("apic_id", cpu.apic_id)?;
        json.number("core", cpu.core.id)
    });
}

/// Tells of machine checks from before this CPU came up.
fn tell_left_over(cpu: &PerCpu, report: Option<Report>) {
    for bank in report.iter().flat_map(|report| &report.banks) {
        log::warn!("machine check before the boot, APIC ID {}: {bank}", cpu.apic_id);
    }
}

/// Where a started CPU arrives, on its stack, with the startup's page tables.
extern "C" fn arrive(argument: u64) -> ! {
    // SAFETY: `start_one` passes the address of a `Launch` that lives for ever.
    let launch: &'static Launch = unsafe { &*(argument as *const Launch) };
    let common = launch.common;
    let root = PhysFrame::containing_address(PhysAddr::new_truncate(common.root));
    // SAFETY: the kernel's page tables, which map all that the startup's do above the lower half.
    unsafe { Cr3::write(root, Cr3Flags::from_bits_truncate(common.root)) };
    match come_online(launch.shared, common) {
        // Nobody waits for it any more.
        Ok((mut cpu, vmx)) if launch.decided.swap(true, Ordering::AcqRel) => leave(&mut cpu, vmx),
        Ok((mut cpu, vmx)) => {
            say_online(launch.shared);
            launch.answer.call_once(|| Ok(()));
            while !GO.load(Ordering::Acquire) {
                core::hint::spin_loop();
            }
            cpu.run();
            leave(&mut cpu, vmx);
            LEFT.fetch_add(1, Ordering::Release);
        }
        Err(why) => {
            launch.answer.call_once(|| Err(why));
        }
    }
    percpu::stop();
}

fn come_online(shared: &'static PerCpu, common: &'static Common) -> Result<(Cpu, Vmx), LeftOut> {
    let (segments, idt) = cpu::initialize().ok_or(LeftOut::OutOfMemory)?;
    let apic = LocalApic::start();
    shared.install();
    tell_left_over(shared, mca::start(false));
    cpu::set_tsc_adjust(common.tsc_adjust);
    let mtrrs = cpu::mtrrs();
    if mtrrs != common.mtrrs {
        log::warn!(
            "the CPU with APIC ID {} has other MTRRs than the boot CPU, which is a mistake of the \
             firmware: {}",
            shared.apic_id,
            mtrrs.map_or(String::from("none"), |mtrrs| format!("{mtrrs}"))
        );
    }
    if let Some(leaf) = visible_cpuid().differs_from(&common.cpuid) {
        return Err(LeftOut::OtherCpuid(leaf));
    }
    let vmx = cpu::enter_vmx(shared, &segments, idt).map_err(LeftOut::NoVmx)?;
    if let Some(number) = vmx.caps.differs_from(&common.caps) {
        vmx.leave();
        return Err(LeftOut::OtherVmx(number));
    }
    let mut sld = SldCpu::real(shared.core);
    let Online { detection, real_bit } = sld::online(&mut sld, common.wishes.real_mode());
    if detection != common.detection {
        // It is online with what it has: back to what it was.
        let _ = sld::offline(&mut sld);
        vmx.leave();
        return Err(LeftOut::OtherDetection(detection));
    }
    let mut cpu = Cpu::new(shared, sld, vmx.host, apic, common.policy);
    cpu.note(Ok(real_bit));
    cpu.start_tracing(common.wishes.software_mode(detection));
    cpu.write_events();
    Ok((cpu, vmx))
}

/// This CPU will run no guest any more.
fn leave(cpu: &mut Cpu, vmx: Vmx) {
    let written = sld::offline(&mut cpu.sld);
    cpu.note(written);
    cpu.stop_tracing();
    cpu.write_events();
    mca::poll(cpu.shared);
    cpu.shared.set_offline();
    vmx.leave();
}
