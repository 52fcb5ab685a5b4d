//! Physical memory: what the BIOS says there is, and access to it.

use core::{mem::MaybeUninit, ptr, slice};

use arrayvec::ArrayVec;
use boot::{
    memory_map::{E820Entry, MAX_ENTRIES},
    physical::Memory,
    rsdp,
};
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use x86_64::PhysAddr;

use super::{Registers, SCRATCH, call};

/// One above what the loader's page tables map, at its physical address.
pub const MAPPED: PhysAddr = PhysAddr::new(1 << 32);

/// "SMAP".
const SIGNATURE: u32 = 0x534d_4150;

/// The memory map of INT 15h function E820h (ACPI specification, "System Address Map Interfaces"),
/// with the first page, which holds the BIOS's data, reserved. The error says what went wrong.
pub fn map() -> Result<ArrayVec<MemoryRegion, MAX_ENTRIES>, &'static str> {
    let mut regions = ArrayVec::new();
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
                return Ok(regions);
            }
            return Err("the BIOS has no memory map (INT 15h function E820h)");
        }
        let entry = SCRATCH.get();
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| entry[at + i]));
        let long = |at: usize| u64::from(number(at)) | u64::from(number(at + 4)) << 32;
        if number(20) & 1 != 0 {
            let entry = E820Entry { start: long(0), len: long(8), kind: number(16) };
            regions.try_push(entry.into()).map_err(|_| "the BIOS's memory map is too long")?;
        }
        next = registers.ebx;
        if next == 0 {
            return Ok(regions);
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

/// Physical memory at its own addresses, up to [`MAPPED`].
pub struct Identity(());

impl Identity {
    /// # Safety
    ///
    /// Only addresses of memory that is there, and that nobody else uses, may be passed to the
    /// methods: that given out by one `Frames` over the BIOS's map.
    pub unsafe fn new() -> Self {
        Self(())
    }

    /// The memory at `at`, as a pointer.
    pub fn pointer<T>(&self, at: PhysAddr) -> *mut T {
        assert!(at < MAPPED);
        ptr::with_exposed_provenance_mut(at.as_u64() as usize)
    }
}

impl Memory for Identity {
    fn read_entry(&self, at: PhysAddr) -> u64 {
        // SAFETY: exclusively ours, initialised and aligned, as the caller of `new` promised and
        // the trait demands.
        unsafe { self.pointer::<u64>(at).read() }
    }

    fn write_entry(&mut self, at: PhysAddr, entry: u64) {
        // SAFETY: as above.
        unsafe { self.pointer::<u64>(at).write(entry) }
    }

    fn write(&mut self, at: PhysAddr, bytes: &[MaybeUninit<u8>]) {
        // SAFETY: as above; what is written to is not what is read, since it is not in use.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer(at), bytes.len()) }
    }

    fn zero(&mut self, at: PhysAddr, len: u64) {
        // SAFETY: as above.
        unsafe { self.pointer::<u8>(at).write_bytes(0, len as usize) }
    }
}
