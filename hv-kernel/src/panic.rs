//! The panic path: no allocation, no lock that could be held, once.

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::screen::Colour;
use crate::x86::apic::LocalApic;
use crate::{console, events, percpu, power, serial, summary};

/// Nobody panics.
const NOBODY: u32 = u32::MAX;

/// The CPU that panics.
static PANICKING: AtomicU32 = AtomicU32::new(NOBODY);

/// Whether a CPU panics: the others stop.
pub fn is_panicking() -> bool {
    PANICKING.load(Ordering::Relaxed) != NOBODY
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let cpu = percpu::try_this();
    let me = cpu.map_or(0, |cpu| cpu.index);
    match PANICKING.compare_exchange(NOBODY, me, Ordering::SeqCst, Ordering::Relaxed) {
        Ok(_) => {}
        // The message itself went wrong: say nothing more.
        Err(first) if first == me => power::end(),
        Err(_) => percpu::stop(),
    }
    if cpu.is_some() {
        percpu::stop_others(LocalApic::current());
    }
    // SAFETY: whoever held them is this CPU or has stopped, and will not go on.
    unsafe {
        console::break_lock();
        serial::EVENTS.break_lock();
    }
    console::with(|console| {
        console.write_unseen(format_args!("\nPANIC {info}"));
        if let Some(cpu) = cpu {
            console.write_unseen(format_args!("CPU {}, {}", cpu.index, cpu.trail));
        }
    });
    events::write(percpu::stamp(), "panic", |json| json.text("message", info));
    // Last, since it takes the most code.
    console::with(|console| {
        console.write_screen(Colour::Error, format_args!("\nPANIC {}", Joined(info)));
        if let Some(cpu) = cpu {
            console.write_screen(Colour::Text, format_args!("CPU {}, {}", cpu.index, cpu.trail));
        }
        summary::show_advice(console, power::at_end());
    });
    power::end();
}

/// Several lines as one, so that a screen has room for them.
struct Joined<T>(T);

impl<T: fmt::Display> fmt::Display for Joined<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Joiner<'a, 'f> {
            out: &'a mut fmt::Formatter<'f>,
            after_space: bool,
        }

        impl Write for Joiner<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                for character in text.chars() {
                    let is_space = character.is_whitespace();
                    if !(is_space && self.after_space) {
                        self.out.write_char(if is_space { ' ' } else { character })?;
                    }
                    self.after_space = is_space;
                }
                Ok(())
            }
        }

        write!(Joiner { out: f, after_space: false }, "{}", self.0)
    }
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
