//! Work that the firmware must not interrupt, with memory mapped as the loader needs it.
//!
//! Firmware may leave free memory unmapped, or forbid to execute it, and its stack may be too small
//! for the loader's core: so this is done on a stack and with page tables of the loader's own.

use core::{
    arch::naked_asm,
    sync::atomic::{AtomicU64, Ordering},
};

use boot::{
    cpu,
    identity::{self, Table},
};
use uefi::{boot as services, proto::loaded_image::LoadedImage};
use x86_64::{PhysAddr, instructions::interrupts};

use crate::{Failure, memory};

/// One above the memory that is mapped while alone, besides the loader's own.
pub const MAPPED: PhysAddr = PhysAddr::new(1 << 32);

const STACK: u64 = 512 << 10;

/// Two for each of three gigabytes, and the highest ones: the first 4 GiB need six.
const TABLES: usize = 16;

/// How far the firmware's stack may reach from where it is now.
const FIRMWARES_STACK: u64 = 128 << 10;

/// The firmware's CR3 while its tables are not in force, else 0.
static FIRMWARES_TABLES: AtomicU64 = AtomicU64::new(0);

/// A stack and page tables.
pub struct Alone {
    root: u64,
    stack_top: u64,
}

/// What is to be done, and what came of it.
struct Call<F, R> {
    work: Option<F>,
    result: Option<R>,
}

impl Alone {
    /// Makes them.
    pub fn new() -> Result<Self, Failure> {
        let stack = memory::allocate("a stack", STACK)?;
        let stack_top = memory::address(stack).as_u64() + STACK;
        let tables = memory::allocate("page tables", (TABLES * size_of::<Table>()) as u64)?;
        let root = memory::address(tables).as_u64();
        // SAFETY: the memory is page-aligned, as large as that many tables, zeroed, and ours alone;
        // any bytes are a valid table.
        let tables =
            unsafe { core::slice::from_raw_parts_mut(tables.as_mut_ptr().cast::<Table>(), TABLES) };

        let image = services::open_protocol_exclusive::<LoadedImage>(services::image_handle())
            .map_err(|error| Failure::Firmware {
                what: "to tell where the loader is",
                status: error.status(),
            })?;
        let (base, size) = image.info();
        let image = base.addr() as u64;
        let here = memory::address(&image).as_u64();
        let ranges = [
            0..MAPPED.as_u64(),
            image..image + size,
            here.saturating_sub(FIRMWARES_STACK)..here + FIRMWARES_STACK,
        ];
        // SAFETY: UEFI runs applications at privilege level 0.
        let five_level = unsafe { cpu::is_five_level() };
        if !identity::map(tables, root, five_level, ranges) {
            return Err(Failure::Firmware {
                what: "to put the loader and its stack near each other",
                status: uefi::Status::UNSUPPORTED,
            });
        }
        Ok(Self { root, stack_top })
    }

    /// Does `work` with interrupts off. It must not call the firmware.
    pub fn run<R>(&self, work: impl FnOnce() -> R) -> R {
        let mut call = Call { work: Some(work), result: None };
        let data = &raw mut call;
        let entry = entry_for(data);
        let (frame, flags) = x86_64::registers::control::Cr3::read_raw();
        FIRMWARES_TABLES
            .store(frame.start_address().as_u64() | u64::from(flags), Ordering::Relaxed);
        // SAFETY: 1. `entry` is made for `data`, which lives until this returns. 2. The tables map the
        // loader, this stack and that one at their own addresses, as do the firmware's. 3. Nobody
        // else uses that stack: `work` does not get at `self` to come back here with.
        unsafe { switch(data.cast(), entry, self.root, self.stack_top) };
        FIRMWARES_TABLES.store(0, Ordering::Relaxed);
        call.result.expect("the work was done")
    }
}

type Entry = unsafe extern "sysv64" fn(*mut ());

/// The function that does the work of a call like `_call`.
fn entry_for<F: FnOnce() -> R, R>(_call: *const Call<F, R>) -> Entry {
    unsafe extern "sysv64" fn entry<F: FnOnce() -> R, R>(call: *mut ()) {
        // SAFETY: `switch` was given a call of this type, which nobody else uses meanwhile.
        let call = unsafe { &mut *call.cast::<Call<F, R>>() };
        call.result = call.work.take().map(|work| work());
    }
    entry::<F, R>
}

/// Ends work in the middle: its stack stays in use, all else is the firmware's again. For a panic.
pub fn abandon() {
    let root = FIRMWARES_TABLES.swap(0, Ordering::Relaxed);
    if root != 0 {
        // SAFETY: these are the tables with which the loader was started; all that is in use they map
        // where it is.
        unsafe { core::arch::asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
        interrupts::enable();
    }
}

/// Calls `entry(data)` with interrupts off, page tables `root`, and the stack that ends at
/// `stack_top`, and returns with all as it was.
///
/// Global pages and shadow stacks are turned off meanwhile: the former would outlast the change of
/// tables, the latter know nothing of the change of stacks (Intel SDM volume 3, "Global Pages"; volume
/// 1, "Control-flow Enforcement Technology").
///
/// # Safety
///
/// 1. `entry` may be called with `data`. 2. The tables map what is used, at its physical address.
/// 3. Nobody else uses that stack.
#[unsafe(naked)]
unsafe extern "sysv64" fn switch(data: *mut (), entry: Entry, root: u64, stack_top: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "pushfq",
        "cli",
        "mov rbx, rsp",
        "mov rbp, cr3",
        "mov r12, cr4",
        "mov rax, r12",
        "and rax, {kept}",
        "mov cr4, rax",
        "mov cr3, rdx",
        "mov rsp, rcx",
        "call rsi",
        "mov rsp, rbx",
        "mov cr3, rbp",
        "mov cr4, r12",
        "popfq",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        kept = const !(1i32 << 7 | 1 << 23),
    )
}
