//! Physical memory: what the BIOS says there is, and access to it.

use core::{cell::OnceCell, fmt, slice};

use arrayvec::ArrayVec;
use boot::{
    memory_map::{E820Entry, MAX_ENTRIES, MemoryMap},
    rsdp,
};
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use x86_64::PhysAddr;

use super::{Registers, SCRATCH, call};

/// One above what the loader's page tables map, at its physical address.
pub const MAPPED: PhysAddr = PhysAddr::new(1 << 32);

/// "SMAP".
const SIGNATURE: u32 = 0x534d_4150;

/// What goes wrong with the memory map.
#[derive(Debug)]
pub enum MapError {
    /// The BIOS has none.
    None,
    /// It has more than there is room for.
    TooLong,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "the BIOS has no memory map (INT 15h function E820h)",
            Self::TooLong => "the BIOS's memory map is too long",
        })
    }
}

/// The memory map, as large as a good part of the stack.
struct Map(OnceCell<MemoryMap>);

// SAFETY: there is one CPU, and interrupt handlers do not use it.
unsafe impl Sync for Map {}

static MAP: Map = Map(OnceCell::new());

/// The memory map of INT 15h function E820h (ACPI specification, "System Address Map Interfaces"),
/// with the first page, which holds the BIOS's data, reserved.
pub fn map() -> Result<&'static MemoryMap, MapError> {
    let mut regions = ArrayVec::new();
    report(&mut regions)?;
    match MemoryMap::new(&regions) {
        Ok(map) => Ok(MAP.0.get_or_init(|| map)),
        Err(_) => Err(MapError::TooLong),
    }
}

/// Adds what the BIOS reports, in its order.
fn report(regions: &mut ArrayVec<MemoryRegion, MAX_ENTRIES>) -> Result<(), MapError> {
    regions.push(MemoryRegion {
        start: 0,
        end: boot::PAGE,
        kind: MemoryRegionKind::UnknownBios(2),
    });
    let mut next = 0;
    loop {
        // Entries have 20 or 24 bytes; where it is missing, the attribute reads as "valid".
        let mut entry = [0; 24];
        entry[20] = 1;
        let (es, di) = SCRATCH.put(&entry);
        let mut registers = Registers {
            eax: 0xe820,
            ebx: next,
            ecx: entry.len() as u32,
            edx: SIGNATURE,
            edi: u32::from(di),
            es,
            ..Registers::default()
        };
        // SAFETY: the service writes at most ECX bytes at ES:DI.
        unsafe { call(0x15, &mut registers) };
        if registers.eax != SIGNATURE || registers.carry() {
            // An error after the first entry is how some BIOSes say that there are no more.
            if next != 0 {
                return Ok(());
            }
            return Err(MapError::None);
        }
        let entry = SCRATCH.get::<24>();
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| entry[at + i]));
        let long = |at: usize| u64::from(number(at)) | u64::from(number(at + 4)) << 32;
        if number(20) & 1 != 0 {
            let entry = E820Entry { start: long(0), len: long(8), kind: number(16) };
            regions.try_push(entry.into()).map_err(|_| MapError::TooLong)?;
        }
        next = registers.ebx;
        if next == 0 {
            return Ok(());
        }
    }
}

/// The ACPI root pointer, in the first KiB of the extended BIOS data area or in the BIOS's own
/// memory (ACPI specification, "Finding the RSDP on IA-PC Systems").
pub fn acpi_root() -> Option<PhysAddr> {
    // SAFETY: the BIOS data area is there on every PC; this word of it is the segment of the
    // extended one.
    let segment = unsafe { (0x40e as *const u16).read_volatile() };
    let extended = usize::from(segment) << 4;
    let areas = [(extended, 1024), (0xe0000, 0x20000)];
    areas.into_iter().filter(|(start, _)| (0x80000..0x100000).contains(start)).find_map(
        |(start, len)| {
            // SAFETY: identity-mapped memory of the BIOS, which nothing writes while we look.
            let area = unsafe { slice::from_raw_parts(start as *const u8, len) };
            rsdp::find(area).map(|offset| PhysAddr::new((start + offset) as u64))
        },
    )
}
