//! The UEFI loader: reads kernel, configuration and guests from the file system that it was itself
//! loaded from, and starts the kernel.
//!
//! Whatever goes wrong while the firmware is there is said on its console and on the first serial
//! port; a key then leads back to the firmware. So all that can go wrong is done before the firmware
//! is left, the loading of the kernel included: that is a rehearsal, and repeated afterwards, when
//! the memory map is final.
#![no_std]
#![no_main]

mod alone;
mod console;
mod failure;
mod files;
mod last_log;
mod memory;
mod ramdisk;
mod screen;
mod serial;

#[path = "../runtime.rs"]
mod runtime;

use core::{convert::Infallible, panic::PanicInfo};

use boot::{
    cpu,
    frames::Frames,
    handover::Handover,
    load::{Framebuffer, Machine, load},
    memory_map::MemoryMap,
    physical::Identity,
    stick,
    uefi_map::Regions,
};
use uefi::{Status, boot as services, entry, system, table::cfg::ConfigTableEntry};
use x86_64::PhysAddr;

use alone::{Alone, MAPPED};
use console::say;
use failure::Failure;
use files::Stick;

/// Memory below this address is left to the kernel: processors start there, in real mode.
const FLOOR: PhysAddr = PhysAddr::new(1 << 20);

#[entry]
fn main() -> Status {
    let Err(failure) = start_kernel();
    console::stop(format_args!("{failure}"), Status::LOAD_ERROR)
}

/// What the kernel is started with.
struct Parts {
    kernel: &'static [u8],
    /// Physical address and size in bytes.
    ramdisk: (PhysAddr, u64),
    rsdp: Option<PhysAddr>,
}

fn start_kernel() -> Result<Infallible, Failure> {
    // By default the firmware restarts the machine after five minutes. A person may need more.
    let _ = services::set_watchdog_timer(0, 0x1_0000, None);
    // SAFETY: UEFI runs applications at privilege level 0.
    if !unsafe { cpu::allow_execute_disable() } {
        return Err(Failure::NoExecuteDisable);
    }
    let alone = Alone::new()?;
    let mut stick = Stick::open()?;
    last_log::save(&mut stick, &alone)?;
    let kernel = kernel(&mut stick)?;
    let ramdisk = ramdisk::make(&mut stick)?;
    drop(stick);
    let parts = Parts { kernel, ramdisk, rsdp: acpi_root() };

    let regions = memory::regions()?;
    alone.run(|| place(&parts, None, &regions))?;

    say(format_args!("starting the kernel"));
    let framebuffer = screen::set_up();
    // SAFETY: no protocol is open any more, and nothing is used from now on that belongs to boot
    // services: the console knows.
    let map = unsafe { services::exit_boot_services(None) };
    console::firmware_is_gone();
    let regions = memory::convert(&map)?;
    alone.run(|| {
        let handover = place(&parts, framebuffer, &regions)?;
        // SAFETY: 1. `place` worked on memory that is free according to the final map, and nothing
        // has run since. 2. It was told of the paging mode; execute-disable was checked. 3. The
        // tables in force map the first 4 GiB as executable. 4. The loader ends here.
        unsafe { handover.enter() }
    })
}

/// Puts the kernel into memory that `regions` calls free, which is to be done alone.
fn place(
    parts: &Parts,
    framebuffer: Option<Framebuffer>,
    regions: &Regions,
) -> Result<Handover, Failure> {
    let map = MemoryMap::new(regions)?;
    let frames = Frames::new(&map, FLOOR, MAPPED);
    // SAFETY: 1. `load` uses addresses from `frames`, which gives out free memory: nobody else uses it
    // as long as the firmware does not run. 2. All below `MAPPED` is mapped when alone.
    let mut memory = unsafe { Identity::new(MAPPED) };
    let machine = Machine {
        kernel: parts.kernel,
        kernel_at: memory::address(parts.kernel),
        ramdisk: Some(parts.ramdisk),
        rsdp: parts.rsdp,
        framebuffer,
        map: &map,
        physical_bits: cpu::physical_bits(),
        gib_pages: cpu::has_gib_pages(),
        // SAFETY: UEFI runs applications at privilege level 0.
        five_level: unsafe { cpu::is_five_level() },
    };
    Ok(load(&machine, &mut memory, frames)?)
}

/// Reads the kernel and checks it.
fn kernel(stick: &mut Stick) -> Result<&'static [u8], Failure> {
    let mut file = stick.open_file(stick::KERNEL)?;
    say(format_args!("reading {} ({} KiB)", stick::KERNEL, file.bytes.div_ceil(1024)));
    let kernel = memory::allocate("the kernel", file.bytes)?;
    file.read(kernel)?;
    if let Some(mut file) = stick.find_file(stick::KERNEL_SUM)? {
        let mut sum = [0; stick::MAX_SUM];
        let sum = &mut sum[..(file.bytes as usize).min(stick::MAX_SUM)];
        file.read(sum)?;
        stick::check_kernel(kernel, sum).map_err(Failure::Damaged)?;
    }
    Ok(kernel)
}

/// The ACPI root pointer, of the newest version that the firmware offers.
fn acpi_root() -> Option<PhysAddr> {
    system::with_config_table(|tables| {
        [ConfigTableEntry::ACPI2_GUID, ConfigTableEntry::ACPI_GUID].into_iter().find_map(|guid| {
            let table = tables.iter().find(|table| table.guid == guid)?;
            PhysAddr::try_new(table.address.addr() as u64).ok()
        })
    })
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    console::first_panic();
    alone::abandon();
    console::stop(format_args!("fault in the loader: {info}"), Status::ABORTED)
}
