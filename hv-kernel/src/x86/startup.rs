//! Starting other CPUs: INIT, SIPI, SIPI. SDM volume 3, section "MP Initialization Protocol
//! Algorithm for Intel 64 Processors".

use core::arch::global_asm;

use vmx::addr::HostPhysAddr;
use vmx::instruction::now;
use x86_64::VirtAddr;
use x86_64::registers::control::{Cr3, Cr4};

use super::apic::{Ipi, LocalApic};
use crate::firmware::CR4_LA57;
use crate::memory;

global_asm!(include_str!("startup.s"), options(att_syntax));

unsafe extern "C" {
    static startup_begin: [u8; 0];
    static startup_end: [u8; 0];
    static startup_root: u32;
    static startup_cr4: u32;
    static startup_far: u32;
    static startup_gdt: u64;
    static startup_gdt_pointer: u16;
    static startup_long: [u8; 0];
    static startup_stack: u64;
    static startup_entry: u64;
    static startup_argument: u64;
}

/// Ticks of the TSC after which a CPU that has not answered gets its second SIPI.
const SECOND_SIPI: u64 = 2_000_000;
/// Ticks of the TSC after which it is given up.
const GIVE_UP: u64 = 400_000_000;

/// Present and writable.
const PRESENT_WRITABLE: u64 = 3;
/// A leaf of 2 MiB.
const LARGE: u64 = 1 << 7;

/// Tables that a page of 2 MiB takes: one a level, five at most. With four levels one is left over.
const MAX_TABLES: usize = 4;

/// The page where CPUs start, and the page tables they start with.
pub struct Startup {
    page: HostPhysAddr,
    tables: [HostPhysAddr; MAX_TABLES],
    root: u64,
}

/// Why no CPU can be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRoom;

/// The kernel's page-table root, with CR3's flags.
pub fn root() -> u64 {
    let (frame, flags) = Cr3::read_raw();
    frame.start_address().as_u64() | u64::from(flags)
}

/// The offset of a symbol of `startup.s` in the page.
fn offset<T: ?Sized>(symbol: *const T) -> u64 {
    symbol.cast::<u8>() as u64 - &raw const startup_begin as u64
}

impl Startup {
    /// Puts the code at `page`, which is below 1 MiB and nobody's.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] without memory below 4 GiB for the tables.
    pub fn new(page: HostPhysAddr) -> Result<Self, NoRoom> {
        let mut tables = [HostPhysAddr::new_truncate(0); MAX_TABLES];
        for table in &mut tables {
            let frame = memory::allocate_frame().filter(|frame| frame.as_u64() < 1 << 32);
            *table = frame.ok_or(NoRoom)?;
        }
        let startup = Self { page, tables, root: root() };
        let five_level = Cr4::read_raw() & CR4_LA57;
        let levels = if five_level != 0 { MAX_TABLES } else { MAX_TABLES - 1 };
        let kernel = memory::to_virtual::<u64>(HostPhysAddr::new_truncate(
            Cr3::read_raw().0.start_address().as_u64(),
        ));
        // SAFETY: (1) the tables are frames of our own; (2) the kernel's root is in the direct
        // map, and nothing changes it meanwhile.
        unsafe {
            // The kernel's half of the address space, and the first 2 MiB where they are.
            let copy = memory::to_virtual::<u64>(tables[0]);
            copy.add(256).copy_from_nonoverlapping(kernel.add(256), 256);
            for level in 1..levels {
                let entry = tables[level].as_u64() | PRESENT_WRITABLE;
                memory::to_virtual::<u64>(tables[level - 1]).write(entry);
            }
            memory::to_virtual::<u64>(tables[levels - 1]).write(PRESENT_WRITABLE | LARGE);
        }
        let code = &raw const startup_begin as *const u8;
        let length = offset(&raw const startup_end) as usize;
        // SAFETY: the page is ours and longer than the code; the symbols delimit the code.
        unsafe { memory::to_virtual::<u8>(page).copy_from_nonoverlapping(code, length) };
        let base = page.as_u64();
        startup.set(&raw const startup_root, tables[0].as_u64() as u32);
        startup.set(&raw const startup_cr4, five_level as u32);
        startup.set(&raw const startup_far, (base + offset(&raw const startup_long)) as u32);
        // The pointer's address follows its limit.
        let gdt_address = (&raw const startup_gdt_pointer).wrapping_add(1).cast::<u32>();
        startup.set(gdt_address, (base + offset(&raw const startup_gdt)) as u32);
        Ok(startup)
    }

    /// Fills in a field of the page.
    fn set<T>(&self, field: *const T, value: T) {
        let address = self.page.as_u64() + offset(field);
        // SAFETY: `field` is one of `startup.s`, so this is within our page.
        unsafe {
            memory::to_virtual::<T>(HostPhysAddr::new_truncate(address)).write_unaligned(value);
        }
    }

    /// Whether the CPU has taken the stack that it was given.
    fn is_taken(&self) -> bool {
        let address = self.page.as_u64() + offset(&raw const startup_stack);
        // SAFETY: as in `set`; the CPU changes it meanwhile.
        unsafe {
            memory::to_virtual::<u64>(HostPhysAddr::new_truncate(address)).read_volatile() == 0
        }
    }

    /// Starts the CPU with this APIC ID: it calls `entry(argument)` on `stack`, with the startup's
    /// page tables, and must load [`root`] first. False if it does not answer; it never will then.
    pub fn start(
        &self,
        apic: LocalApic,
        target: u32,
        stack: VirtAddr,
        entry: extern "C" fn(u64) -> !,
        argument: u64,
    ) -> bool {
        self.set(&raw const startup_entry, entry as *const () as u64);
        self.set(&raw const startup_argument, argument);
        self.set(&raw const startup_stack, stack.as_u64());
        let page = (self.page.as_u64() >> 12) as u8;
        apic.send(target, Ipi::Init);
        // CPUs with VMX need no pause here: as in Linux, `smp_quirk_init_udelay`.
        apic.send(target, Ipi::Startup(page));
        if self.answers_within(SECOND_SIPI) {
            return true;
        }
        apic.send(target, Ipi::Startup(page));
        if self.answers_within(GIVE_UP) {
            return true;
        }
        // From now on it finds no stack, unless it took it just now.
        let stack = self.page.as_u64() + offset(&raw const startup_stack);
        let stack = memory::to_virtual::<u64>(HostPhysAddr::new_truncate(stack));
        // SAFETY: an aligned field of our page, which only this and the other CPU's XCHG touch.
        let stack = unsafe { core::sync::atomic::AtomicU64::from_ptr(stack) };
        stack.swap(0, core::sync::atomic::Ordering::SeqCst) == 0
    }

    fn answers_within(&self, ticks: u64) -> bool {
        let start = now();
        while now().wrapping_sub(start) < ticks {
            if self.is_taken() {
                return true;
            }
            core::hint::spin_loop();
        }
        false
    }

    /// CR3 for a CPU that has arrived.
    pub const fn kernel_root(&self) -> u64 {
        self.root
    }
}

impl Drop for Startup {
    fn drop(&mut self) {
        self.tables.into_iter().for_each(memory::free_frame);
    }
}
