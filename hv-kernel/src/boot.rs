//! From the loader to the last VM's end.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use bootloader_api::config::Mapping;
use bootloader_api::info::{MemoryRegionKind, Optional};
use bootloader_api::{BootInfo, BootloaderConfig, entry_point};
use sld::{Detection, Policy, Source};

use crate::config::{AtEnd, Config};
use crate::fleet;
use crate::inbox::Message;
use crate::operator::Operator;
use crate::percpu::{self, MAX_CPUS};
use crate::ramdisk::{self, Ramdisk, RamdiskError};
use crate::sched;
use crate::screen::Screen;
use crate::smp::BootCpu;
use crate::source::Wishes;
use crate::summary::{self, Ending};
use crate::vm::{Bitmaps, Factory};
use crate::x86::{cpu, mca};
use crate::{acpi, clock, console, events, hardware, logger, memory, platform, power, serial};

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
    cpu::begin();
    let rsdp = info.rsdp_addr.into_option();
    let ports =
        serial::initialize(rsdp.and_then(|rsdp| acpi::serial_console(&memory::DirectMap, rsdp)));
    let framebuffer = core::mem::replace(&mut info.framebuffer, Optional::None).into_option();
    let screen = match framebuffer {
        Some(framebuffer) => Screen::of_framebuffer(framebuffer),
        // SAFETY: the loader leaves the screen in text mode where it gives no framebuffer.
        None if firmware(info) == "bios" => unsafe { Screen::of_text_mode() },
        None => Screen::none(),
    };
    console::with(|console| {
        console.use_ports(ports);
        console.screen = screen;
        console.title(format_args!("Unsplit {}", env!("CARGO_PKG_VERSION")));
    });
    logger::initialize();
    let ramdisk = ramdisk(info).map(|ramdisk| {
        let (log, archive) = ramdisk::split_log(ramdisk);
        console::with(|console| console.keep(log));
        archive
    });
    if let Err(why) = run(info, ramdisk) {
        log::error!("{why}");
        refused(&why);
    }
    power::end()
}

/// Why the hypervisor does not run.
type Refusal = alloc::string::String;

fn refuse(why: impl fmt::Display) -> Refusal {
    alloc::format!("{why}")
}

fn refused(why: &str) {
    console::with(|console| summary::show(console, Ending::Refused(why), power::at_end()));
    events::write(percpu::stamp(), "refused", |json| json.text("why", why));
}

fn run(
    info: &'static BootInfo,
    ramdisk: Result<&'static [u8], RamdiskError>,
) -> Result<(), Refusal> {
    let mtrrs = cpu::mtrrs();
    let memory = memory::initialize(&info.memory_regions, mtrrs.as_ref()).unwrap_or_else(|short| {
        // Without a heap there is no `Refusal` either.
        log::error!(
            "too little memory: {} MiB usable; the hypervisor needs about 16 MiB for itself",
            short.usable >> 20
        );
        refused("too little memory");
        power::end()
    });
    let rsdp = info.rsdp_addr.into_option();
    let acpi = rsdp.and_then(|rsdp| acpi::read(&memory::DirectMap, rsdp));
    if let Some(acpi) = &acpi {
        power::initialize(acpi.power);
    }
    let apic_ids = acpi.map_or(Vec::new(), |acpi| acpi.cpus);
    hardware::report(&memory, mtrrs.as_ref(), &apic_ids);
    platform::start();
    cpu::mask_legacy_interrupts();
    let ramdisk = Ramdisk::new(ramdisk.map_err(refuse)?).map_err(refuse)?;
    let file = ramdisk.config().map_err(refuse)?;
    power::set_at_end(AtEnd::of_file(file));
    let config = Config::parse(file).map_err(refuse)?;
    let policy = sched::Policy {
        slice_ticks: config.slice_ticks,
        migrate_exits: config.migrate_exits,
        stop_after_loads: config.stop_after_loads,
        verify: config.verify,
        schedule_events: config.schedule_events,
    };
    let wishes = Wishes::of(&config);
    let mut boot = BootCpu::start(wishes, policy).map_err(refuse)?;
    let bitmaps = Bitmaps::new().ok_or("no memory is left for bitmaps")?;
    let limit = config.cpus.map_or(MAX_CPUS, |cpus| cpus as usize);
    let page = memory::low_page(&info.memory_regions);
    boot.start_others(&apic_ids, limit, page, (wishes, policy));
    let domains = wishes.on(boot.detection, boot.cpu.sld.mode());
    say_boot(&boot, &config, domains.default_source(), firmware(info));
    let caps = Box::leak(Box::new(boot.caps));
    let config: &'static Config = Box::leak(Box::new(config));
    fleet::initialize(Factory { caps, bitmaps, ramdisk, domains }, &config.vms);
    sched::set_vms(make_vms());
    if config.console {
        boot.cpu.operator = Some(Box::new(Operator::new()));
    }
    boot.run();
    boot.leave();
    shut_down();
    Ok(())
}

fn ramdisk(info: &BootInfo) -> Result<&'static mut [u8], RamdiskError> {
    let address = info.ramdisk_addr.into_option().ok_or(RamdiskError::Absent)?;
    let length = usize::try_from(info.ramdisk_len).map_err(|_| RamdiskError::Damaged)?;
    // SAFETY: the loader has mapped the ramdisk there for the kernel to read and to write, and does
    // not list it as usable memory; this is called once.
    Ok(unsafe { core::slice::from_raw_parts_mut(address as *mut u8, length) })
}

fn firmware(info: &BootInfo) -> &'static str {
    let uefi = |kind| matches!(kind, MemoryRegionKind::UnknownUefi(_));
    if info.memory_regions.iter().any(|region| uefi(region.kind)) { "uefi" } else { "bios" }
}

/// Says what has come up.
fn say_boot(boot: &BootCpu, config: &Config, source: Source, firmware: &str) {
    let cpus = percpu::online().count_ones();
    events::write(boot.boot, "boot", |json| {
        json.text("version", env!("CARGO_PKG_VERSION"))?;
        json.number("cpus", cpus)?;
        json.text("sld", config.sld)?;
        json.text("sld_source", source)?;
        if let Some(ticks) = clock::known_ticks_per_second() {
            json.number("ticks_per_second", ticks)?;
        }
        json.text("firmware", firmware)
    });
    summary::host(summary::Host { cpus, mode: config.sld, source, detection: boot.detection });
    if cpus > 1 {
        log::info!("{cpus} CPUs");
    }
    if let Detection::Failed(failure) = boot.detection {
        log::error!("CPU 0: split-lock detection does not work: {failure}");
    }
    match source {
        Source::Trace => log::info!("split-lock detection: mode {}, by tracing", config.sld),
        Source::None if config.sld == Policy::Off => log::info!("split-lock detection: off"),
        Source::None => log::warn!(
            "no split-lock detection: guests' split locks happen unseen, mode {} is without effect",
            config.sld
        ),
        Source::Auto | Source::Msr => log::info!("split-lock detection: mode {}", config.sld),
    }
}

/// Makes the VMs and gives each vCPU to the CPU that has the least to do. How many VMs there are.
fn make_vms() -> u32 {
    let mut loads = [0; MAX_CPUS];
    let mut count = 0;
    for place in fleet::places() {
        let made = place.plan().and_then(|mut plan| {
            while !plan.fill()? {}
            place.start(plan, &mut loads, |task, cpu| cpu.inbox.push(Message::Take(task)))
        });
        match made {
            Ok(()) => count += 1,
            Err(why) => {
                place.refuse(&why);
                summary::refused(&place.config.name, &why);
            }
        }
    }
    count
}

fn shut_down() {
    let (counters, vms, violations) = sched::totals();
    log::info!("all VMs have ended");
    platform::finish();
    let ending = Ending::Finished { exits: counters.all_exits(), violations };
    console::with(|console| summary::show(console, ending, power::at_end()));
    events::write(percpu::stamp(), "shutdown", |json| {
        json.object("counters", |json| {
            json.number("vms", vms)?;
            json.number("exits", counters.all_exits())?;
            counters.split_locks.write(json)?;
            json.number("nmis", percpu::nmis())?;
            json.number("unknown_nmis", percpu::unknown_nmis())?;
            json.number("corrected_errors", mca::corrected())?;
            json.number("loads", counters.loads)?;
            json.number("migrations", counters.migrations)?;
            json.number("violations", violations)
        })
    });
}
