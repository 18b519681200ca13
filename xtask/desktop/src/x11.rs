//! Input that comes from the window system and not from the page: closing the window, removing the focus from the
//! window, and pressing menu shortcuts.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use x11rb::{
    CURRENT_TIME, NONE,
    connection::Connection as _,
    protocol::{
        Event,
        xproto::{
            AtomEnum, ChangeWindowAttributesAux, ClientMessageEvent, ConnectionExt as _, EventMask,
            InputFocus, KEY_PRESS_EVENT, KEY_RELEASE_EVENT, MapState, PropMode, Window,
        },
        xtest::ConnectionExt as _,
    },
    rust_connection::RustConnection,
    wrapper::ConnectionExt as _,
};

/// X11 keysyms.
pub const CONTROL: u32 = 0xffe3;
pub const Q: u32 = 0x71;
pub const F1: u32 = 0xffbe;

/// How long to wait after changing the focus. The toolkit learns about the change from an event.
const EVENT_DELAY: Duration = Duration::from_millis(300);

pub struct Display {
    connection: RustConnection,
    root: Window,
}

impl Display {
    pub fn connect(name: &str) -> Result<Self> {
        let (connection, screen) = x11rb::connect(Some(name))?;
        let root = connection.setup().roots[screen].root;
        Ok(Self { connection, root })
    }

    /// Returns the visible window with a title. Without a window manager, the window is a child of the root window.
    fn window(&self, title: &str) -> Result<Window> {
        let tree = self.connection.query_tree(self.root)?.reply()?;
        for window in tree.children {
            let state = self.connection.get_window_attributes(window)?.reply()?;
            let name = self
                .connection
                .get_property(false, window, AtomEnum::WM_NAME, AtomEnum::ANY, 0, 64)?
                .reply()?;
            if state.map_state == MapState::VIEWABLE && name.value == title.as_bytes() {
                return Ok(window);
            }
        }
        None.context("no such window")
    }

    fn atom(&self, name: &str) -> Result<u32> {
        let atom = self.connection.intern_atom(false, name.as_bytes())?;
        Ok(atom.reply()?.atom)
    }

    /// Asks a window to close, like the button of a window manager.
    pub fn close(&self, title: &str) -> Result<()> {
        let window = self.window(title)?;
        let data = [self.atom("WM_DELETE_WINDOW")?, CURRENT_TIME, 0, 0, 0];
        let event = ClientMessageEvent::new(32, window, self.atom("WM_PROTOCOLS")?, data);
        self.connection
            .send_event(false, window, EventMask::NO_EVENT, event)?
            .check()?;
        Ok(())
    }

    /// Returns the X server's time, in milliseconds.
    pub fn time(&self) -> Result<u32> {
        let attributes = ChangeWindowAttributesAux::new().event_mask(EventMask::PROPERTY_CHANGE);
        self.connection
            .change_window_attributes(self.root, &attributes)?
            .check()?;
        let name = self.atom("QUOTA_TIME")?;
        self.connection
            .change_property8(PropMode::REPLACE, self.root, name, AtomEnum::STRING, b"")?
            .check()?;
        loop {
            if let Event::PropertyNotify(event) = self.connection.wait_for_event()?
                && event.atom == name
            {
                return Ok(event.time);
            }
        }
    }

    /// Takes the focus from all windows, as if the user were looking at another program.
    pub async fn unfocus(&self) -> Result<()> {
        self.connection
            .set_input_focus(InputFocus::NONE, NONE, CURRENT_TIME)?
            .check()?;
        tokio::time::sleep(EVENT_DELAY).await;
        Ok(())
    }

    /// Focuses a window, and presses keys together.
    pub async fn press(&self, title: &str, keysyms: &[u32]) -> Result<()> {
        let window = self.window(title)?;
        self.connection
            .set_input_focus(InputFocus::PARENT, window, CURRENT_TIME)?
            .check()?;
        tokio::time::sleep(EVENT_DELAY).await;
        let codes = keysyms
            .iter()
            .map(|keysym| self.keycode(*keysym))
            .collect::<Result<Vec<_>>>()?;
        let send = |kind: u8, code: u8| -> Result<()> {
            let input = self
                .connection
                .xtest_fake_input(kind, code, 0, NONE, 0, 0, 0)?;
            Ok(input.check()?)
        };
        for code in &codes {
            send(KEY_PRESS_EVENT, *code)?;
        }
        for code in codes.iter().rev() {
            send(KEY_RELEASE_EVENT, *code)?;
        }
        Ok(())
    }

    fn keycode(&self, keysym: u32) -> Result<u8> {
        let setup = self.connection.setup();
        let first = setup.min_keycode;
        let count = setup.max_keycode - first + 1;
        let map = self
            .connection
            .get_keyboard_mapping(first, count)?
            .reply()?;
        let width = usize::from(map.keysyms_per_keycode);
        ensure!(width > 0, "no keyboard");
        let at = map.keysyms.iter().position(|it| *it == keysym);
        let at = at.context("no such key")? / width;
        Ok(first + u8::try_from(at)?)
    }
}
