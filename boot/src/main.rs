//! The BIOS stage: reads kernel, configuration and guests from the boot disk and starts the kernel.
//! If the run before left a log in memory, that is saved on the disk first.
//!
//! Whatever goes wrong is said on the screen and on the first serial port, and the machine restarts
//! when a key is pressed.
#![no_std]
#![no_main]

mod bios;
mod runtime;

use core::{
    fmt::{self, Write},
    iter,
    panic::PanicInfo,
    slice,
};

use arrayvec::ArrayString;
use bios::{
    a20, clock,
    console::Console,
    disk::{self, Partition},
    exceptions, keyboard,
    memory::{self, MAPPED, MapError},
    restart, screen,
};
use boot::{
    archive, cpu,
    frames::Frames,
    load::{Framebuffer, Machine, load},
    log,
    memory_map::MemoryMap,
    physical::Identity,
    stick::{self, CONFIG, GUESTS, KERNEL, KERNEL_SUM, LOG, MAX_SUM},
    volume::{self, Storage},
};
use bootloader_api::info::MemoryRegionKind;
use x86_64::PhysAddr;

/// The stick's file system.
type Volume<'mount> = volume::Volume<'mount, Partition>;

/// KiB of conventional memory that the layout in `bios.ld` takes.
const CONVENTIONAL_MEMORY: u32 = 512;

/// Memory below this address is left to the kernel: processors start there, in real mode.
const FLOOR: PhysAddr = PhysAddr::new(1 << 20);

/// Why the kernel cannot be started.
enum Failure {
    Load(boot::Error),
    Disk(disk::Error),
    Volume(volume::Error<disk::Error>),
    Damaged(stick::Damaged),
    Map(MapError),
    ConventionalMemory(u32),
    A20,
    NoTable,
    NoConfig,
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

impl From<MapError> for Failure {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

impl From<volume::Error<disk::Error>> for Failure {
    fn from(error: volume::Error<disk::Error>) -> Self {
        Self::Volume(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load(error) => error.fmt(f),
            Self::Disk(error) => error.fmt(f),
            Self::Volume(error) => error.fmt(f),
            Self::Damaged(damaged) => damaged.fmt(f),
            Self::Map(error) => error.fmt(f),
            Self::ConventionalMemory(kib) => write!(
                f,
                "the BIOS leaves {kib} KiB of conventional memory, the loader needs \
                 {CONVENTIONAL_MEMORY}"
            ),
            Self::A20 => f.write_str("address line 20 cannot be enabled"),
            Self::NoConfig => {
                write!(f, "there is no {CONFIG} on the stick, the file that says what to run")
            }
            Self::NoTable => f.write_str("the disk does not say where its files are"),
        }
    }
}

/// Called by the assembly, in 64-bit mode.
#[unsafe(no_mangle)]
extern "sysv64" fn loader_main() -> ! {
    bios::mark_stack();
    exceptions::install();
    screen::show_text();
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
    start_with(memory::map()?)
}

/// Starts the kernel in this memory. Out of line, for the stack's sake: the map is made when this
/// is not there yet.
#[inline(never)]
fn start_with(map: &MemoryMap) -> Result<core::convert::Infallible, Failure> {
    // SAFETY: 1. Used with free memory only, to look for a log before any is given out, and then with
    // addresses from `frames`, here and by `load`. 2. That much is mapped by the assembly.
    let mut memory = unsafe { Identity::new(MAPPED) };
    let mut frames = Frames::new(map, FLOOR, MAPPED);
    let files = read_files(map, &mut frames, &memory)?;
    // As late as can be: until then, the screen shows messages.
    let mode = screen::best(|framebuffer| is_no_memory(map, framebuffer)).filter(screen::set);
    if mode.is_none() {
        screen::show_text();
    }
    let machine = Machine {
        kernel: files.kernel,
        kernel_at: files.kernel_at,
        ramdisk: Some(files.ramdisk),
        rsdp: memory::acpi_root(),
        framebuffer: mode.map(|mode| mode.framebuffer),
        map,
        physical_bits: cpu::physical_bits(),
        gib_pages: cpu::has_gib_pages(),
        five_level: false,
    };
    let handover = load(&machine, &mut memory, frames)?;
    assert!(bios::stack_was_enough(), "the stack is too small");
    // SAFETY: 1. `load` worked on the BIOS's memory. 2. The assembly brought the CPU into 64-bit mode
    // and refused one without execute-disable. 3. The loader's tables map all of the first 4 GiB
    // as executable. 4. The loader ends here.
    unsafe { handover.enter() }
}

/// What is read from the stick.
struct Files {
    kernel: &'static [u8],
    kernel_at: PhysAddr,
    /// Address and size.
    ramdisk: (PhysAddr, u64),
}

/// Saves the last run's log and reads the files into memory from `frames`, of which nothing was given
/// out yet. Out of line for the same reason.
#[inline(never)]
fn read_files(map: &MemoryMap, frames: &mut Frames, memory: &Identity) -> Result<Files, Failure> {
    let mut storage = Storage::default();
    let mut volume = mount(&mut storage);
    save_log(map, memory, &mut volume);
    let mut volume = volume?;
    let (kernel_at, kernel) = read_kernel(&mut volume, frames, memory)?;
    let ramdisk = make_ramdisk(&mut volume, frames, memory)?;
    Ok(Files { kernel, kernel_at, ramdisk })
}

/// The volume on the boot disk.
fn mount(storage: &mut Storage) -> Result<Volume<'_>, Failure> {
    let partition = Partition::open(bios::table().ok_or(Failure::NoTable)?)?;
    Ok(Volume::mount(partition, storage, clock::now)?)
}

/// Saves the log that the last run left in memory, if it did, and waits until somebody has seen that.
fn save_log(map: &MemoryMap, memory: &Identity, volume: &mut Result<Volume<'_>, Failure>) {
    let areas = log::places(map, MAPPED.as_u64()).map(|at| {
        // SAFETY: all memory below `MAPPED` is mapped. Nobody uses free memory yet but the loader, which
        // is below all of these places.
        unsafe { slice::from_raw_parts_mut(memory.pointer(PhysAddr::new(at)), log::BYTES as usize) }
    });
    let mut logs = areas.filter(|area| log::text(area).is_some());
    let Some(last) = logs.next() else { return };
    let text = log::text(last).unwrap_or_default();
    say(format_args!("saving the log of the last run"));
    match volume.as_mut().map(|volume| volume.write(LOG, text)) {
        Ok(Ok(())) => {
            // There can be older ones, where the ramdisk was at another address.
            iter::once(last).chain(logs).for_each(log::erase);
            say(format_args!("the log of the last run is on the stick: {LOG}"));
        }
        Ok(Err(why)) => show_end(text, &why),
        Err(why) => show_end(text, why),
    }
    say(format_args!("press a key to start the hypervisor again"));
    keyboard::wait();
}

/// Shows the end of a log that cannot be saved, and why.
fn show_end(text: &[u8], why: &dyn fmt::Display) {
    const LINES: usize = 16;
    let mut ends = text.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    let start = ends.nth(LINES).map_or(0, |(index, _)| index + 1);
    for chunk in text[start..].utf8_chunks() {
        let _ = Console.write_str(chunk.valid());
    }
    say(format_args!("the log of the last run, which ends so, cannot be saved: {why}"));
}

/// Reads the kernel's file into memory of its own and checks it.
fn read_kernel(
    volume: &mut Volume<'_>,
    frames: &mut Frames,
    memory: &Identity,
) -> Result<(PhysAddr, &'static [u8]), Failure> {
    let bytes = volume.size(KERNEL)?;
    say(format_args!("reading {KERNEL} ({} KiB)", bytes.div_ceil(1024)));
    let at = frames.allocate(bytes, "the kernel's file")?;
    // SAFETY: `frames` gave this memory out for the purpose; all of it is mapped, and above what
    // the BIOS uses.
    let kernel = unsafe { slice::from_raw_parts_mut(memory.pointer(at), bytes as usize) };
    volume.read(KERNEL, kernel)?;

    match volume.size(KERNEL_SUM) {
        Ok(bytes) => {
            let mut sum = [0; MAX_SUM];
            let sum = &mut sum[..bytes.min(MAX_SUM as u64) as usize];
            volume.read(KERNEL_SUM, sum)?;
            stick::check_kernel(kernel, sum).map_err(Failure::Damaged)?;
        }
        Err(error) if error.is_missing() => {}
        Err(error) => return Err(error.into()),
    }
    Ok((at, kernel))
}

/// Makes the ramdisk: an archive of room for a log, the configuration and all guests' images. Its
/// address and size.
fn make_ramdisk(
    volume: &mut Volume<'_>,
    frames: &mut Frames,
    memory: &Identity,
) -> Result<(PhysAddr, u64), Failure> {
    let config = match volume.size(CONFIG) {
        Err(error) if error.is_missing() => return Err(Failure::NoConfig),
        size => size?,
    };
    let images = volume.images()?;
    let images_bytes: u64 = images.iter().map(|image| archive::room(image.bytes)).sum();
    let bytes = archive::room(log::BYTES) + archive::room(config) + images_bytes + archive::END;
    say(format_args!("reading {CONFIG} and {GUESTS} ({} KiB)", bytes.div_ceil(1024)));
    let at = frames.allocate_aligned(bytes, log::ALIGN, "the ramdisk")?;
    // SAFETY: `frames` gave this memory out for the purpose; all of it is mapped, and above what
    // the BIOS uses.
    let ramdisk = unsafe { slice::from_raw_parts_mut(memory.pointer(at), bytes as usize) };

    let mut archive = archive::Writer::new(ramdisk);
    archive.file(log::NAME, log::BYTES)?.fill(0);
    volume.read(CONFIG, archive.file(CONFIG, config)?)?;
    for image in &images {
        let mut path = ArrayString::<{ GUESTS.len() + 1 + volume::MAX_NAME }>::new();
        for part in [GUESTS, "/", &image.name] {
            path.push_str(part);
        }
        volume.read_image(image, archive.file(&path, image.bytes)?)?;
    }
    Ok((at, archive.finish()?))
}

/// Whether a framebuffer is where the BIOS reports no memory: one of them is wrong otherwise.
fn is_no_memory(map: &MemoryMap, framebuffer: &Framebuffer) -> bool {
    let start = framebuffer.start.as_u64();
    let end = start + framebuffer.info.byte_len as u64;
    let mut memory = map.regions().iter().filter(|r| r.kind == MemoryRegionKind::Usable);
    !memory.any(|region| region.start < end && start < region.end)
}

/// Says what goes on.
fn say(what: fmt::Arguments<'_>) {
    let _ = writeln!(Console, "boot: {what}");
}

/// Says why, and restarts the machine when somebody has seen that.
fn stop(why: fmt::Arguments<'_>) -> ! {
    screen::show_text();
    say(why);
    say(format_args!("press a key to restart the machine"));
    say(format_args!("stopped"));
    keyboard::wait();
    restart::restart()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    stop(format_args!("fault in the loader: {info}"))
}
