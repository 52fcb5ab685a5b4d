//! Page tables: the first 4 GiB mapped one to one, a window that shows any 2 MiB of the physical
//! address space, and small pages that show any 4 KiB each.
//!
//! Everything is writable, executable and open to CPL 3: these guests test the hypervisor, not
//! themselves.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes that the window shows.
pub const WINDOW_BYTES: u64 = 2 << 20;
/// Where the window is: right behind what is mapped one to one.
const WINDOW: u64 = 4 << 30;

/// Present, writable, for all rings.
pub(crate) const TABLE: u64 = 0b111;
/// The same for a page of 2 MiB.
pub(crate) const LARGE_PAGE: u64 = 1 << 7 | TABLE;

/// One level 4 table, one level 3 table, five level 2 tables: 4 GiB and the window. The PVH entry
/// fills them.
#[repr(C, align(4096))]
pub(crate) struct PageTables(pub(crate) [[AtomicU64; 512]; 7]);

pub(crate) static PAGE_TABLES: PageTables =
    PageTables([const { [const { AtomicU64::new(0) }; 512] }; 7]);

/// Maps the 2 MiB page that holds `physical` and returns where that byte is now. The former view is
/// gone.
pub fn window(physical: u64) -> *mut u8 {
    let offset = physical % WINDOW_BYTES;
    PAGE_TABLES.0[6][0].store((physical - offset) | LARGE_PAGE, Ordering::Relaxed);
    forget(WINDOW as *const u8);
    (WINDOW + offset) as *mut u8
}

/// How many small pages there are.
pub const SMALL_PAGES: usize = 512;
/// Where they are: right behind the window.
const SMALL: u64 = WINDOW + WINDOW_BYTES;

/// The level 1 table of the small pages.
#[repr(C, align(4096))]
struct SmallTable([AtomicU64; SMALL_PAGES]);

static SMALL_TABLE: SmallTable = SmallTable([const { AtomicU64::new(0) }; SMALL_PAGES]);

/// The address of a small page (`index` below [`SMALL_PAGES`]).
pub fn small_page(index: usize) -> *mut u8 {
    (SMALL + 4096 * index as u64) as *mut u8
}

/// The page table's entry of a small page.
pub fn small_entry(index: usize) -> &'static AtomicU64 {
    &SMALL_TABLE.0[index]
}

/// Makes a small page show the 4 KiB at `physical`. CPUs may still use the former translation until
/// they [`forget`] it.
pub fn show(index: usize, physical: u64) {
    SMALL_TABLE.0[index].store(physical | TABLE, Ordering::Release);
    PAGE_TABLES.0[6][1].store(&raw const SMALL_TABLE as u64 | TABLE, Ordering::Release);
}

/// Makes this CPU forget the translation of a page, by INVLPG.
pub fn forget(page: *const u8) {
    // SAFETY: forgets a translation, which changes nothing but what was shown anew.
    unsafe { asm!("invlpg [{}]", in(reg) page, options(nostack, preserves_flags)) };
}
