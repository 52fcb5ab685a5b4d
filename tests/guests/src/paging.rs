//! Page tables: the first 4 GiB mapped one to one, and a window that shows any 2 MiB of the
//! physical address space.
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
    // SAFETY: forgets a translation, which changes nothing but the window.
    unsafe { asm!("invlpg [{}]", in(reg) WINDOW, options(nostack, preserves_flags)) };
    (WINDOW + offset) as *mut u8
}
