//! From the loader to the last VM's end.

use alloc::vec::Vec;
use core::fmt;

use bootloader_api::config::Mapping;
use bootloader_api::info::MemoryRegionKind;
use bootloader_api::{BootInfo, BootloaderConfig, entry_point};
use sld::{Detection, SldMode};

use crate::config::Config;
use crate::events::{self, Ring};
use crate::ramdisk::{Ramdisk, RamdiskError};
use crate::sched::{Cpu, MAX_WARNINGS, SldCpu, Totals};
use crate::vm::{Bitmaps, Factory, Vm};
use crate::x86::cpu::{self, Vmx};
use crate::x86::exceptions;
use crate::{TRAIL, acpi, logger, memory, power, serial};

/// Not read: cargo builds again when the linker script changes.
const _: &str = include_str!("../kernel.ld");

/// What the kernel asks of the loader.
const BOOTLOADER_CONFIG: BootloaderConfig = {
    let mut config = BootloaderConfig::new_default();
    config.mappings.physical_memory = Some(Mapping::FixedAddress(memory::DIRECT_MAP));
    config.kernel_stack_size = 64 * 1024;
    config
};

entry_point!(main, config = &BOOTLOADER_CONFIG);

fn main(info: &'static mut BootInfo) -> ! {
    serial::LOG.initialize();
    serial::EVENTS.initialize();
    logger::initialize();
    log::info!("Unsplit {}", env!("CARGO_PKG_VERSION"));
    if let Err(why) = run(info) {
        log::error!("{why}");
        events::write_raw("refused", "why", &why);
    }
    power::off()
}

/// Why the hypervisor does not run.
type Refusal = alloc::string::String;

fn refuse(why: impl fmt::Display) -> Refusal {
    alloc::format!("{why}")
}

fn run(info: &'static BootInfo) -> Result<(), Refusal> {
    if let Err(short) = memory::initialize(&info.memory_regions) {
        // Without a heap there is no `Refusal` either.
        log::error!(
            "too little memory: {} MiB usable; the hypervisor needs about 16 MiB for itself",
            short.usable >> 20
        );
        events::write_raw("refused", "why", &"too little memory");
        power::off();
    }
    let acpi = info.rsdp_addr.into_option();
    if let Some(acpi) = acpi.and_then(|rsdp| acpi::read(&memory::DirectMap, rsdp)) {
        power::initialize(acpi);
    }
    cpu::mask_legacy_interrupts();
    let (segments, idt) = cpu::initialize();
    let ramdisk = Ramdisk::new(ramdisk(info).map_err(refuse)?).map_err(refuse)?;
    let config = Config::parse(ramdisk.config().map_err(refuse)?).map_err(refuse)?;
    let vmx = cpu::enter_vmx(&segments, idt).map_err(refuse)?;
    let bitmaps = Bitmaps::new().ok_or("no memory is left for bitmaps")?;
    let mut cpu = Cpu {
        index: 0,
        sld: SldCpu::new(),
        events: Ring::new(0),
        trail: &TRAIL,
        host: vmx.host,
        warnings_left: MAX_WARNINGS,
    };
    start_detection(&mut cpu, &config, firmware(info));
    let host = sld::Host { configured: config.sld, enforced: cpu.sld.mode() };
    let factory = Factory { caps: &vmx.caps, bitmaps, ramdisk, host };
    let vms = start_vms(&mut cpu, &factory, &config);
    let totals = cpu.run(vms.into_iter(), config.slice_ticks);
    shut_down(cpu, vmx, &totals);
    Ok(())
}

fn ramdisk(info: &'static BootInfo) -> Result<&'static [u8], RamdiskError> {
    let address = info.ramdisk_addr.into_option().ok_or(RamdiskError::Absent)?;
    let length = usize::try_from(info.ramdisk_len).map_err(|_| RamdiskError::Damaged)?;
    // SAFETY: the loader has mapped the ramdisk there for the kernel's use, and does not list it
    // as usable memory.
    Ok(unsafe { core::slice::from_raw_parts(address as *const u8, length) })
}

fn firmware(info: &BootInfo) -> &'static str {
    let uefi = |kind| matches!(kind, MemoryRegionKind::UnknownUefi(_));
    if info.memory_regions.iter().any(|region| uefi(region.kind)) { "uefi" } else { "bios" }
}

/// Probes split-lock detection and says what came of it.
fn start_detection(cpu: &mut Cpu, config: &Config, firmware: &str) {
    let online = sld::online(&mut cpu.sld, config.sld);
    let source = match online.detection {
        Detection::Works => "msr",
        Detection::Absent | Detection::Failed(_) => "none",
    };
    cpu.events.write("boot", |json| {
        json.text("version", env!("CARGO_PKG_VERSION"))?;
        json.number("cpus", 1u32)?;
        json.text("sld", config.sld)?;
        json.text("sld_source", source)?;
        json.text("firmware", firmware)
    });
    cpu.note(None, Ok(online.real_bit));
    match online.detection {
        Detection::Works => log::info!("split-lock detection: mode {}", config.sld),
        Detection::Failed(failure) => {
            log::error!("CPU {}: split-lock detection does not work: {failure}", cpu.index);
        }
        Detection::Absent if config.sld == SldMode::Off => log::info!("split-lock detection: off"),
        Detection::Absent => log::warn!(
            "this CPU has no split-lock detection: guests' split locks happen unseen, mode {} is \
             without effect",
            config.sld
        ),
    }
}

fn start_vms(cpu: &mut Cpu, factory: &Factory<'_>, config: &Config) -> Vec<Vm> {
    let mut vms = Vec::with_capacity(config.vms.len());
    for (index, vm_config) in (0u16..).zip(&config.vms) {
        let name = vm_config.name.as_str();
        match factory.build(vm_config, index) {
            Ok(vm) => {
                let (policy, bytes) = (vm.guest.policy, vm.guest.memory.len());
                log::info!("VM {name}: {} MiB, policy {}", bytes >> 20, policy.mode());
                cpu.events.write("vm-start", |json| {
                    json.text("vm", name)?;
                    json.text("policy", policy.mode())?;
                    json.flag("exposed", policy.exposed())?;
                    json.number("vcpus", 1u32)?;
                    json.number("memory_bytes", bytes)
                });
                vms.push(vm);
            }
            Err(why) => {
                log::error!("VM {name} cannot start: {why}");
                cpu.events.write("vm-refused", |json| {
                    json.text("vm", name)?;
                    json.text("why", why)
                });
            }
        }
    }
    vms
}

fn shut_down(mut cpu: Cpu, vmx: Vmx, totals: &Totals) {
    let written = sld::offline(&mut cpu.sld);
    cpu.note(None, written);
    vmx.leave();
    log::info!("all VMs have ended");
    cpu.events.write("shutdown", |json| {
        json.object("counters", |json| {
            json.number("vms", totals.vms)?;
            json.number("exits", totals.exits)?;
            totals.split_locks.write(json)?;
            json.number("nmis", exceptions::nmis())
        })
    });
}
