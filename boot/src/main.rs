//! The BIOS stage: reads kernel and ramdisk from the boot disk and starts the kernel.
//!
//! Whatever goes wrong is said on the screen and on the first serial port, and the machine stops.
#![no_std]
#![no_main]

mod bios;

use core::{
    arch::x86_64::__cpuid,
    fmt::{self, Write},
    panic::PanicInfo,
    slice,
};

use bios::{
    a20,
    console::Console,
    disk, exceptions,
    memory::{self, Identity, MAPPED},
};
use boot::{
    disk::Extent,
    frames::Frames,
    load::{Machine, load},
    memory_map::MemoryMap,
};
use x86_64::PhysAddr;

/// KiB of conventional memory that the layout in `bios.ld` takes.
const CONVENTIONAL_MEMORY: u32 = 512;

/// Memory below this address is left to the kernel: processors start there, in real mode.
const FLOOR: PhysAddr = PhysAddr::new(1 << 20);

/// Why the kernel cannot be started.
enum Failure {
    Load(boot::Error),
    Disk(disk::Error),
    MemoryMap(&'static str),
    ConventionalMemory(u32),
    A20,
    NoTable,
}

impl From<boot::Error> for Failure {
    fn from(error: boot::Error) -> Self {
        Self::Load(error)
    }
}

impl From<disk::Error> for Failure {
    fn from(error: disk::Error) -> Self {
        Self::Disk(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load(error) => error.fmt(f),
            Self::Disk(error) => error.fmt(f),
            Self::MemoryMap(why) => f.write_str(why),
            Self::ConventionalMemory(kib) => write!(
                f,
                "the BIOS leaves {kib} KiB of conventional memory, the loader needs \
                 {CONVENTIONAL_MEMORY}"
            ),
            Self::A20 => f.write_str("address line 20 cannot be enabled"),
            Self::NoTable => f.write_str("the disk does not say where kernel and ramdisk are"),
        }
    }
}

/// Called by the assembly, in 64-bit mode.
#[unsafe(no_mangle)]
extern "sysv64" fn loader_main() -> ! {
    exceptions::install();
    let Err(failure) = start_kernel();
    stop(format_args!("{failure}"))
}

fn start_kernel() -> Result<core::convert::Infallible, Failure> {
    let conventional = bios::conventional_memory();
    if conventional < CONVENTIONAL_MEMORY {
        return Err(Failure::ConventionalMemory(conventional));
    }
    if !a20::enable() {
        return Err(Failure::A20);
    }
    let table = bios::table().ok_or(Failure::NoTable)?;
    let map = MemoryMap::new(&memory::map().map_err(Failure::MemoryMap)?)?;
    let mut frames = Frames::new(&map, FLOOR, MAPPED);
    // SAFETY: used with addresses from `frames` only, here and by `load`.
    let mut memory = unsafe { Identity::new() };

    let sectors = disk::sectors()?;
    let (kernel_at, kernel) = fetch("the kernel", table.kernel, sectors, &mut frames, &memory)?;
    let ramdisk = match table.ramdisk.bytes {
        0 => None,
        bytes => {
            let (at, _) = fetch("the ramdisk", table.ramdisk, sectors, &mut frames, &memory)?;
            Some((at, bytes))
        }
    };

    let machine = Machine {
        kernel,
        kernel_at,
        ramdisk,
        rsdp: memory::acpi_root(),
        framebuffer: None,
        map: &map,
        physical_bits: cpuid(0x8000_0008).map_or(36, |[eax, _]| eax & 0xff),
        gib_pages: cpuid(0x8000_0001).is_some_and(|[_, edx]| edx & 1 << 26 != 0),
        five_level: false,
    };
    let handover = load(&machine, &mut memory, frames)?;
    // SAFETY: 1. `load` worked on the BIOS's memory. 2. The assembly brought the CPU into 64-bit mode
    // and refused one without execute-disable. 3. The loader's tables map all of the first 4 GiB
    // as executable. 4. The loader ends here.
    unsafe { handover.enter() }
}

/// Reads `file` into memory of its own and checks it.
fn fetch(
    what: &'static str,
    file: Extent,
    sectors: u64,
    frames: &mut Frames,
    memory: &Identity,
) -> Result<(PhysAddr, &'static [u8]), Failure> {
    if file.end() > sectors {
        return Err(disk::Error::Truncated { what, end: file.end(), sectors }.into());
    }
    let at = frames.allocate(file.bytes, what)?;
    let start = memory.pointer(at);
    // SAFETY: `frames` gave this memory out for the purpose; all of it is mapped, and above what
    // the BIOS uses.
    let bytes = unsafe {
        disk::read(what, file, start)?;
        slice::from_raw_parts(start, file.bytes as usize)
    };
    let found = boot::disk::checksum(bytes);
    if found != file.checksum {
        return Err(disk::Error::Damaged { what, found, expected: file.checksum }.into());
    }
    Ok((at, bytes))
}

/// EAX and EDX of an extended CPUID leaf, if there is such.
fn cpuid(leaf: u32) -> Option<[u32; 2]> {
    (__cpuid(0x8000_0000).eax >= leaf).then(|| {
        let result = __cpuid(leaf);
        [result.eax, result.edx]
    })
}

/// Says why, and stops the machine for good.
fn stop(why: fmt::Arguments<'_>) -> ! {
    let _ = writeln!(Console, "boot: {why}\nboot: stopped");
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    stop(format_args!("fault in the loader: {info}"))
}
