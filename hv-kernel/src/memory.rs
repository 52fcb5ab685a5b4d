//! Physical memory: the direct map, the frame allocator and the heap.

use core::sync::atomic::{AtomicBool, Ordering};

use bootloader_api::info::{MemoryRegionKind, MemoryRegions};
use linked_list_allocator::LockedHeap;
use spin::Mutex;
use vmx::addr::HostPhysAddr;
use vmx::ept::TableMemory;

use crate::acpi::Physical;
use crate::frames::{FRAME, FrameAllocator, LARGE_FRAME};

/// Where the loader maps all physical memory: asked for in [`crate::BOOTLOADER_CONFIG`].
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// Heap for what lives as long as its VM or for ever. Nothing that a guest does allocates.
pub const HEAP_BYTES: u64 = HEAP_FRAMES as u64 * LARGE_FRAME;
/// The same in large frames.
const HEAP_FRAMES: usize = 4;
/// Memory below this stays untouched: firmware data, and start-up code of other CPUs.
const LOW_MEMORY: u64 = 1 << 20;

#[cfg_attr(not(test), global_allocator)]
static HEAP: LockedHeap = LockedHeap::empty();

static FRAMES: Mutex<Option<FrameAllocator<'static>>> = Mutex::new(None);

/// Too little memory to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLittleMemory {
    /// Usable bytes found.
    pub usable: u64,
}

/// The address in the direct map of a physical address.
pub fn to_virtual<T>(address: HostPhysAddr) -> *mut T {
    (DIRECT_MAP + address.as_u64()) as *mut T
}

/// Takes the usable memory over from the loader.
///
/// # Errors
///
/// [`TooLittleMemory`].
///
/// # Panics
///
/// When called twice.
pub fn initialize(regions: &MemoryRegions) -> Result<(), TooLittleMemory> {
    static DONE: AtomicBool = AtomicBool::new(false);
    assert!(!DONE.swap(true, Ordering::Relaxed), "memory is taken over once");
    let usable = || {
        let regions = regions.iter().filter(|region| region.kind == MemoryRegionKind::Usable);
        regions.map(|region| (region.start.max(LOW_MEMORY), region.end)).filter(|(s, e)| s < e)
    };
    let total = usable().map(|(start, end)| end - start).sum();
    let top = usable().map(|(_, end)| end).max().unwrap_or(0);
    let words = FrameAllocator::words(top);
    let bytes = words as u64 * 8;
    let room = usable().find(|(start, end)| end - start.next_multiple_of(8) >= bytes);
    let Some((start, _)) = room else { return Err(TooLittleMemory { usable: total }) };
    let start = start.next_multiple_of(8);
    let bitmap = to_virtual::<u64>(HostPhysAddr::new_truncate(start));
    // SAFETY: (1) the loader reports the range as usable RAM and maps it; (2) it is aligned and
    // long enough; (3) `DONE` proves that this happens once, and the range is not made free below.
    let bitmap = unsafe {
        bitmap.write_bytes(0, words);
        core::slice::from_raw_parts_mut(bitmap, words)
    };
    let mut frames = FrameAllocator::new(bitmap);
    for (region_start, end) in usable() {
        let first =
            if region_start.next_multiple_of(8) == start { start + bytes } else { region_start };
        frames.add(first, end);
    }
    // Neighbouring large frames make the heap: the allocator hands them out from the top.
    let short = TooLittleMemory { usable: total };
    let upper = frames.allocate_large().ok_or(short)?;
    let mut lower = upper;
    for _ in 1..HEAP_FRAMES {
        lower = frames.allocate_large().ok_or(short)?;
    }
    if upper.as_u64() - lower.as_u64() != HEAP_BYTES - LARGE_FRAME {
        return Err(short);
    }
    // SAFETY: the range is mapped, unused, and the heap's from now on.
    unsafe { HEAP.lock().init(to_virtual(lower), HEAP_BYTES as usize) };
    *FRAMES.lock() = Some(frames);
    Ok(())
}

/// A page below 1 MiB that nobody uses: where other CPUs start.
pub fn low_page(regions: &MemoryRegions) -> Option<HostPhysAddr> {
    let usable = regions.iter().filter(|region| region.kind == MemoryRegionKind::Usable);
    let mut first = usable.map(|region| {
        // Not the first page: the BIOS keeps its data there.
        let start = region.start.max(FRAME).next_multiple_of(FRAME);
        (start, region.end.min(LOW_MEMORY))
    });
    first.find(|(start, end)| start + FRAME <= *end).and_then(|(start, _)| HostPhysAddr::new(start))
}

fn with_frames<T>(action: impl FnOnce(&mut FrameAllocator<'static>) -> T) -> T {
    action(FRAMES.lock().as_mut().expect("memory was taken over at boot"))
}

/// Free memory in bytes.
pub fn free_bytes() -> u64 {
    with_frames(|frames| frames.free_bytes())
}

/// A zeroed frame.
pub fn allocate_frame() -> Option<HostPhysAddr> {
    let frame = with_frames(FrameAllocator::allocate)?;
    // SAFETY: a whole frame that is nobody else's.
    unsafe { to_virtual::<u8>(frame).write_bytes(0, FRAME as usize) };
    Some(frame)
}

/// Takes a frame back.
pub fn free_frame(frame: HostPhysAddr) {
    with_frames(|frames| frames.free(frame));
}

/// A zeroed 2-MiB frame: guests never see what another guest left behind.
pub fn allocate_large_frame() -> Option<HostPhysAddr> {
    let frame = with_frames(FrameAllocator::allocate_large)?;
    // SAFETY: a whole large frame that is nobody else's.
    unsafe { to_virtual::<u8>(frame).write_bytes(0, LARGE_FRAME as usize) };
    Some(frame)
}

/// Takes a 2-MiB frame back.
pub fn free_large_frame(frame: HostPhysAddr) {
    with_frames(|frames| frames.free_large(frame));
}

/// The machine's memory as the place of extended page tables.
pub struct Tables;

impl TableMemory for Tables {
    fn allocate(&mut self) -> Option<HostPhysAddr> {
        allocate_frame()
    }

    fn free(&mut self, table: HostPhysAddr) {
        free_frame(table);
    }

    fn read(&self, table: HostPhysAddr, index: usize) -> u64 {
        assert!(index < 512);
        // SAFETY: `table` is a frame of `allocate`, 512 aligned entries.
        unsafe { to_virtual::<u64>(table).add(index).read_volatile() }
    }

    fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64) {
        assert!(index < 512);
        // SAFETY: as for `read`.
        unsafe { to_virtual::<u64>(table).add(index).write_volatile(entry) };
    }
}

/// All memory that the loader has mapped, for reading what the firmware left there.
pub struct DirectMap;

impl Physical for DirectMap {
    fn read(&self, address: HostPhysAddr, buffer: &mut [u8]) -> bool {
        // The loader maps at least the first 4 GiB, where firmware keeps its tables.
        if address.as_u64() + buffer.len() as u64 > 1 << 32 {
            return false;
        }
        // SAFETY: mapped, and nothing but firmware data is asked for, which does not change.
        unsafe {
            to_virtual::<u8>(address).copy_to_nonoverlapping(buffer.as_mut_ptr(), buffer.len())
        };
        true
    }
}
