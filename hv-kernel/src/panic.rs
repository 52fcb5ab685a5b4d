//! The panic path: no allocation, no lock that could be held, once.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{TRAIL, events, power, serial};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKING: AtomicBool = AtomicBool::new(false);
    if PANICKING.swap(true, Ordering::Relaxed) {
        // The message itself went wrong: say nothing more.
        power::off();
    }
    // SAFETY: whoever held the ports is this CPU, and will not go on.
    unsafe {
        serial::LOG.break_lock();
        serial::EVENTS.break_lock();
    }
    serial::LOG.with(|port| write!(port, "\r\nPANIC {info}\r\n{TRAIL}\r\n"));
    events::write_raw("panic", "message", info);
    power::off();
}

/// Referred to by the precompiled `core` library; never called, since panics abort.
// SAFETY: nothing else defines or calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above, for the landing pads of the precompiled `alloc` library.
// SAFETY: nothing else defines or calls it.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    unreachable!("panics abort")
}
