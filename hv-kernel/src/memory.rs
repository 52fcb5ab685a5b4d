//! Physical memory: the direct map, the frame allocator and the heap.

use core::sync::atomic::{AtomicBool, Ordering};

use bootloader_api::info::{MemoryRegionKind, MemoryRegions};
use linked_list_allocator::LockedHeap;
use spin::Mutex;
use vmx::addr::HostPhysAddr;
use vmx::ept::TableMemory;

use crate::acpi::Physical;
use crate::frames::{FRAME, FrameAllocator, LARGE_FRAME};
use crate::mtrr::{Kind, Mtrrs};

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

/// What there is, and what of it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Parts of the loader's map.
    pub regions: usize,
    /// Usable bytes from 1 MiB on.
    pub usable: u64,
    /// The part of these that is not write-back, and left out.
    pub uncached: u64,
    /// The part that lies too high to be kept account of, and is left out.
    pub beyond: u64,
    /// Where the highest used byte ends.
    pub top: u64,
}

/// How usable memory is kept account of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// Memory above is left out.
    top: u64,
    /// Where the bitmap lies.
    bitmap: u64,
}

/// The bitmap describes all memory up to `top`, holes too: it takes at most one part of so many of the
/// memory that it describes.
const BITMAP_SHARE: u64 = 16;

/// Finds a place for the bitmap. A little memory far above a big hole would take a bitmap that is larger
/// than what it gives: it is left out. `None` if there is hardly any memory.
fn plan<I: Iterator<Item = (u64, u64)>>(usable: impl Fn() -> I) -> Option<Plan> {
    let highest = |limit| usable().map(|(_, end)| end).filter(|end| *end < limit).max();
    let mut top = highest(u64::MAX)?;
    loop {
        let bytes = FrameAllocator::words(top) as u64 * 8;
        let below = || {
            let parts = usable().map(|(start, end)| (start.next_multiple_of(8), end.min(top)));
            parts.filter(|(start, end)| start < end)
        };
        let total: u64 = below().map(|(start, end)| end - start).sum();
        // As high as possible: what lies below 4 GiB is scarce.
        let room = below().filter(|(start, end)| end - start >= bytes).last();
        if let Some((bitmap, _)) = room
            && bytes <= total / BITMAP_SHARE
        {
            return Some(Plan { top, bitmap });
        }
        top = highest(top)?;
    }
}

/// Takes the usable memory over from the loader, but for what the MTRRs make other than write-back: a
/// mistake of the firmware, as a rule, which would make the hypervisor very slow there. Linux leaves it
/// out too.
///
/// With MTRRs that are off all memory would have to go. Firmware does not leave them off; a hypervisor
/// underneath may, where they mean nothing. So nothing is left out then. For guests it makes no
/// difference: their memory has the type that extended page tables give it, write-back, and MTRRs have
/// no say in that (SDM volume 3, section "EPT and Memory Typing").
///
/// # Errors
///
/// [`TooLittleMemory`].
///
/// # Panics
///
/// When called twice.
pub fn initialize(
    regions: &MemoryRegions,
    mtrrs: Option<&Mtrrs>,
) -> Result<Summary, TooLittleMemory> {
    static DONE: AtomicBool = AtomicBool::new(false);
    assert!(!DONE.swap(true, Ordering::Relaxed), "memory is taken over once");
    if mtrrs.is_some_and(|mtrrs| !mtrrs.enabled) {
        log::warn!(
            "the MTRRs are off: this machine's memory would be uncacheable, and very slow. Guests \
             have theirs write-back all the same"
        );
    }
    let mtrrs = mtrrs.filter(|mtrrs| mtrrs.enabled);
    let usable = || usable(regions, mtrrs);
    let cached =
        || usable().filter(|(_, _, kind)| *kind == Kind::WriteBack).map(|(s, e, _)| (s, e));
    let bytes = |parts: &mut dyn Iterator<Item = (u64, u64)>| parts.map(|(s, e)| e - s).sum();
    let all: u64 = bytes(&mut usable().map(|(start, end, _)| (start, end)));
    let uncached = all - bytes(&mut cached());
    for (start, end, kind) in usable().filter(|(_, _, kind)| *kind != Kind::WriteBack) {
        log::warn!(
            "memory {start:#x}..{end:#x} is not used: its type is {kind}, not write-back \
             (MTRRs). An update of the firmware may set that right"
        );
    }
    let short = TooLittleMemory { usable: all };
    let Plan { top, bitmap: start } = plan(cached).ok_or(short)?;
    let words = FrameAllocator::words(top);
    let bitmap = to_virtual::<u64>(HostPhysAddr::new_truncate(start));
    // SAFETY: (1) the loader reports the range as usable RAM and maps it; (2) it is aligned and
    // long enough; (3) `DONE` proves that this happens once, and the range is not made free below;
    // (4) whatever RAM holds are numbers.
    let bitmap = unsafe { core::slice::from_raw_parts_mut(bitmap, words) };
    let mut frames = FrameAllocator::new(bitmap);
    for (first, end) in cached() {
        let is_bitmap = first.next_multiple_of(8) == start;
        frames.add(if is_bitmap { start + words as u64 * 8 } else { first }, end);
    }
    let beyond = bytes(&mut cached().map(|(s, e)| (s.max(top), e)).filter(|(s, e)| s < e));
    if beyond > 0 {
        log::warn!(
            "{} MiB of memory above {top:#x} are not used: they lie too far above the rest",
            beyond >> 20
        );
    }
    let heap = frames.allocate_run(HEAP_FRAMES).ok_or(short)?;
    // SAFETY: the range is mapped, unused, and the heap's from now on.
    unsafe { HEAP.lock().init(to_virtual(heap), HEAP_BYTES as usize) };
    *FRAMES.lock() = Some(frames);
    Ok(Summary { regions: regions.len(), usable: all, uncached, beyond, top })
}

/// Usable memory from [`LOW_MEMORY`] on, in parts of one type.
fn usable<'a>(
    regions: &'a MemoryRegions,
    mtrrs: Option<&'a Mtrrs>,
) -> impl Iterator<Item = (u64, u64, Kind)> + 'a {
    let usable = regions.iter().filter(|region| region.kind == MemoryRegionKind::Usable);
    let usable = usable.map(|region| (region.start.max(LOW_MEMORY), region.end));
    usable.filter(|(start, end)| start < end).flat_map(move |(start, end)| {
        let parts = mtrrs.map(|mtrrs| mtrrs.parts(start, end));
        let whole = parts.is_none().then_some((start, end, Kind::WriteBack));
        parts.into_iter().flatten().chain(whole)
    })
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

/// A memory error was reported at this address: its frame is not given out again.
pub fn condemn(address: HostPhysAddr) -> bool {
    with_frames(|frames| frames.condemn(address))
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const TIB: u64 = 1 << 40;

    fn plan_of(parts: &[(u64, u64)]) -> Option<(u64, u64)> {
        plan(|| parts.iter().copied()).map(|plan| (plan.top, plan.bitmap))
    }

    #[test]
    fn the_bitmap_lies_in_the_highest_part_with_room() {
        assert_eq!(plan_of(&[(MIB, 256 * MIB)]), Some((256 * MIB, MIB)));
        let desktop = [(MIB, 2 * GIB), (2 * GIB + MIB, 2 * GIB + 5 * MIB), (4 * GIB, 34 * GIB)];
        assert_eq!(plan_of(&desktop), Some((34 * GIB, 4 * GIB)));
        // 6 TiB take 192 MiB, and what is at the very top is less.
        let server = [(MIB, 2 * GIB), (4 * GIB, 6 * TIB - GIB), (6 * TIB - MIB, 6 * TIB)];
        assert_eq!(plan_of(&server), Some((6 * TIB, 4 * GIB)));
        assert_eq!(plan_of(&[(MIB + 3, 16 * MIB)]), Some((16 * MIB, MIB + 8)));
    }

    #[test]
    fn little_memory_far_above_is_left_out() {
        // 16 TiB take 512 MiB.
        let sparse = [(MIB, 2 * GIB), (4 * GIB, 6 * GIB), (16 * TIB - 64 * MIB, 16 * TIB)];
        assert_eq!(plan_of(&sparse), Some((6 * GIB, 4 * GIB)));
        // With enough of it, it is used.
        let enough = [(MIB, 2 * GIB), (4 * GIB, 6 * GIB), (16 * TIB - 8 * GIB, 16 * TIB)];
        assert_eq!(plan_of(&enough), Some((16 * TIB, 16 * TIB - 8 * GIB)));
        // The last of three steps down.
        let steps = [(MIB, 64 * MIB), (TIB, TIB + MIB), (8 * TIB, 8 * TIB + 2 * MIB)];
        assert_eq!(plan_of(&steps), Some((64 * MIB, MIB)));
    }

    #[test]
    fn without_memory_there_is_no_plan() {
        assert_eq!(plan_of(&[]), None);
        assert_eq!(plan_of(&[(MIB, MIB + 8)]), None);
        assert_eq!(plan_of(&[(64 * TIB, 64 * TIB + MIB)]), None);
    }
}
