//! CPU exceptions in the loader: said, not survived.

use core::cell::UnsafeCell;

use x86_64::{VirtAddr, registers::control::Cr2, structures::idt::InterruptDescriptorTable};

/// One entry for each vector that the CPU itself can raise, 16 bytes of code each.
const ENTRY_SIZE: u64 = 16;

unsafe extern "sysv64" {
    static exception_entries: u8;
    /// What the mode switch loads as interrupt descriptor table: limit, address.
    static mut idt_pointer: Pointer;
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

struct Table(UnsafeCell<InterruptDescriptorTable>);

// SAFETY: written once, before it is loaded, by the only CPU.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new(InterruptDescriptorTable::new()));

/// What the entries push, and the first word that the CPU does.
#[repr(C)]
struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
}

/// Makes exceptions end in a message.
pub fn install() {
    let handler =
        |vector: u64| VirtAddr::from_ptr(&raw const exception_entries) + vector * ENTRY_SIZE;
    // SAFETY: nothing uses the table yet. The handlers are those of the assembly, which do not
    // return.
    unsafe {
        let table = &mut *TABLE.0.get();
        table.divide_error.set_handler_addr(handler(0));
        table.invalid_opcode.set_handler_addr(handler(6));
        table.double_fault.set_handler_addr(handler(8));
        table.general_protection_fault.set_handler_addr(handler(13));
        table.page_fault.set_handler_addr(handler(14));
        let base = TABLE.0.get() as u64;
        let limit = (size_of::<InterruptDescriptorTable>() - 1) as u16;
        table.load_unsafe();
        // Each call to the BIOS replaces the table and loads it again.
        (&raw mut idt_pointer).write(Pointer { limit, base });
    }
}

/// Called by the entries.
#[unsafe(no_mangle)]
extern "sysv64" fn loader_exception(frame: &Frame) -> ! {
    crate::stop(format_args!(
        "fault in the loader: exception {} at {:#x}, error code {:#x}, CR2 {:#x}",
        frame.vector,
        frame.rip,
        frame.error_code,
        Cr2::read_raw()
    ))
}
