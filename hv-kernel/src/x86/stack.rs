//! Stacks, each above a page that is not mapped.

use core::sync::atomic::{AtomicU64, Ordering};

use vmx::addr::HostPhysAddr;
use x86_64::registers::control::{Cr3, Cr4};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::firmware::CR4_LA57;
use crate::frames::FRAME;
use crate::memory::{self, DIRECT_MAP};

/// Where they lie: the last but one 512 GiB of the address space, of which the loader uses nothing.
const STACKS: u64 = 0xffff_ff00_0000_0000;

/// Where the next one begins.
static NEXT: AtomicU64 = AtomicU64::new(STACKS);

struct Frames;

// SAFETY: every frame is handed out once.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let frame = memory::allocate_frame()?;
        Some(PhysFrame::containing_address(PhysAddr::new(frame.as_u64())))
    }
}

/// The fourth-level table of the highest part of the address space: the root, or what its last entry
/// leads to where the loader runs with five levels.
fn fourth_level() -> *mut PageTable {
    let table = |address: PhysAddr| {
        memory::to_virtual::<PageTable>(HostPhysAddr::new_truncate(address.as_u64()))
    };
    let root = table(Cr3::read_raw().0.start_address());
    if Cr4::read_raw() & CR4_LA57 == 0 {
        return root;
    }
    // SAFETY: the root is in the direct map, as is the kernel's part, which is in use.
    table(unsafe { (&(*root))[511].addr() })
}

/// A new stack of so many bytes, a multiple of the page size: the address above it. `None` without
/// memory. CPUs come online one after the other, so one at a time calls this.
pub fn allocate(bytes: u64) -> Option<VirtAddr> {
    let guard = NEXT.fetch_add(FRAME + bytes, Ordering::Relaxed);
    // SAFETY: (1) all page tables are in the direct map; (2) nothing else holds a reference to
    // them: this is the only place that changes them, and one CPU at a time is here.
    let mut tables =
        unsafe { OffsetPageTable::new(&mut *fourth_level(), VirtAddr::new(DIRECT_MAP)) };
    let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::NO_EXECUTE;
    let bottom = guard + FRAME;
    for address in (bottom..bottom + bytes).step_by(FRAME as usize) {
        let page = Page::containing_address(VirtAddr::new(address));
        let frame = Frames.allocate_frame()?;
        // SAFETY: the page is new, the frame is nobody else's.
        let mapped = unsafe { tables.map_to(page, frame, flags, &mut Frames) };
        // Nothing was there before that a TLB could hold.
        mapped.ok()?.ignore();
    }
    Some(VirtAddr::new(bottom + bytes))
}
