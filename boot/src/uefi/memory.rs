//! Memory as the firmware has it.

use core::slice;

use boot::{
    PAGE,
    uefi_map::{self, Descriptor, Regions},
};
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use uefi::{
    boot::{self as services, AllocateType, MemoryType},
    mem::memory_map::MemoryMap,
};
use x86_64::PhysAddr;

use crate::{Failure, alone::MAPPED};

/// The memory map as it is now.
pub fn regions() -> Result<Regions, Failure> {
    let map = services::memory_map(MemoryType::LOADER_DATA).map_err(|error| Failure::Firmware {
        what: "to tell its memory map",
        status: error.status(),
    })?;
    Ok(convert(&map)?)
}

/// The same of a map that is there.
pub fn convert(map: &impl MemoryMap) -> Result<Regions, boot::Error> {
    uefi_map::regions(map.entries().map(|entry| Descriptor {
        kind: entry.ty.0,
        start: entry.phys_start,
        pages: entry.page_count,
        attributes: entry.att.bits(),
    }))
}

/// `bytes` zeros below [`MAPPED`], at the start of a page, that the firmware leaves alone, now and
/// later. `what` names the purpose in the error.
pub fn allocate(what: &'static str, bytes: u64) -> Result<&'static mut [u8], Failure> {
    let place = AllocateType::MaxAddress(MAPPED.as_u64() - 1);
    allocate_at(place, bytes).ok_or_else(|| no_memory(what, bytes))
}

/// The same at a multiple of the log's alignment, where it is likely to outlive a restart.
pub fn allocate_lasting(what: &'static str, bytes: u64) -> Result<&'static mut [u8], Failure> {
    let at = uefi_map::middle(&regions()?, what, bytes.next_multiple_of(PAGE))?;
    allocate_at(AllocateType::Address(at), bytes).ok_or_else(|| no_memory(what, bytes))
}

fn allocate_at(place: AllocateType, bytes: u64) -> Option<&'static mut [u8]> {
    let pages = bytes.div_ceil(PAGE).max(1) as usize;
    let memory = services::allocate_pages(place, MemoryType::LOADER_DATA, pages).ok()?;
    // SAFETY: the firmware gave out these pages, which are written before they are read, and which
    // nobody gives back.
    unsafe {
        memory.write_bytes(0, pages * PAGE as usize);
        Some(slice::from_raw_parts_mut(memory.as_ptr(), bytes as usize))
    }
}

fn no_memory(what: &'static str, bytes: u64) -> Failure {
    let usable = |region: &&MemoryRegion| region.kind == MemoryRegionKind::Usable;
    let largest = regions().map_or(0, |regions| {
        regions.iter().filter(usable).map(|region| region.end - region.start).max().unwrap_or(0)
    });
    boot::Error::NoMemory { what, bytes, largest }.into()
}

/// The physical address of something of the loader's: UEFI maps memory at its own addresses.
pub fn address<T: ?Sized>(of: &T) -> PhysAddr {
    PhysAddr::new((&raw const *of).addr() as u64)
}
