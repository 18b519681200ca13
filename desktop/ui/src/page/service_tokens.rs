//! The list of service tokens, with gateway configurations to copy.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::{
    Page,
    service_token::{CreateServiceToken, ServiceToken},
};

use super::key_status::time_or;
use crate::{
    api::{self, CallError},
    component::{
        Alert, Async, CodeBlock, Confirm, EmptyState, Field, FormState, Loader, Modal, NewSecret,
        PageHeader, Pager, RelativeTime, SecretDialog, Shape, Toasts, busy_attr, load, load_page,
        open_from_query,
    },
    model::text::{Gateway, quoted},
    session::session,
};

#[component]
pub fn ServiceTokens() -> impl IntoView {
    let loader = load_page(api::list_service_tokens);
    let creating = RwSignal::new(false);
    open_from_query(creating);
    let new = NewSecret::new();
    let form = FormState::new();
    let deletion = Deletion::new();
    let session = session();
    view! {
        <PageHeader title="Service tokens" about="Let your gateways check requests.">
            {move || session.can_manage().then(|| view! { <button class="button primary" on:click=move |_| creating.set(true)>"New token"</button> })}
        </PageHeader>
        <Async
            loader
            show=move |page| {
                if page.items.is_empty() {
                    return view! {
                        <EmptyState shape=Shape::Token title="No service tokens yet" about="Create one for each gateway. Configurations for Caddy, nginx, HAProxy and Traefik are included.">
                            {session.can_manage().then(|| view! { <button class="button primary" on:click=move |_| creating.set(true)>"Create your first token"</button> })}
                        </EmptyState>
                    }
                        .into_any();
                }
                view! { <TokenTable page deletion/> }.into_any()
            }
        />
        <section class="card" aria-labelledby="gateways">
            <h2 id="gateways">"Gateway configuration"</h2>
            <Configuration token="qs_…"/>
        </section>
        <Modal open=creating panel=true title="New service token" locked=form.busy>
            <CreateForm open=creating form new loader/>
        </Modal>
        <NewTokenDialog new/>
        <DeleteDialog deletion loader/>
    }
}

#[component]
fn TokenTable(page: Page<ServiceToken>, deletion: Deletion) -> impl IntoView {
    let shown = page.items.len();
    let can_manage = session().can_manage();
    let rows = page
        .items
        .into_iter()
        .map(|token| {
            let label = format!("Delete {}", token.name);
            let it = token.clone();
            view! {
                <tr>
                    <th scope="row" dir="auto"><span class="clamp">{token.name.clone()}</span></th>
                    <td data-label="Token"><code>{token.prefix.clone()}"…"</code></td>
                    <td data-label="Last used">{time_or(token.last_used_at, "Never used")}</td>
                    <td data-label="Created"><RelativeTime at=token.created_at/></td>
                    <td class="row-actions">
                        {can_manage
                            .then(|| {
                                view! { <button class="button small" aria-label=label on:click=move |_| deletion.ask(it.clone())>"Delete"</button> }
                            })}
                    </td>
                </tr>
            }
        })
        .collect_view();
    view! {
        <table class="table">
            <caption class="visually-hidden">"Service tokens, newest first"</caption>
            <thead>
                <tr>
                    <th scope="col">"Name"</th>
                    <th scope="col">"Token"</th>
                    <th scope="col">"Last used"</th>
                    <th scope="col">"Created"</th>
                    <th scope="col"><span class="visually-hidden">"Actions"</span></th>
                </tr>
            </thead>
            <tbody>{rows}</tbody>
        </table>
        <Pager total=page.total shown next=page.next_cursor/>
    }
}

#[derive(Clone, Copy)]
struct Deletion {
    token: RwSignal<Option<ServiceToken>>,
    open: RwSignal<bool>,
    failure: RwSignal<Option<CallError>>,
}

impl Deletion {
    fn new() -> Self {
        Self {
            token: RwSignal::new(None),
            open: RwSignal::new(false),
            failure: RwSignal::new(None),
        }
    }

    fn ask(self, token: ServiceToken) {
        self.failure.set(None);
        self.token.set(Some(token));
        self.open.set(true);
    }
}

#[component]
fn DeleteDialog(deletion: Deletion, loader: Loader<Page<ServiceToken>>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let Deletion {
        token,
        open,
        failure,
    } = deletion;
    let busy = RwSignal::new(false);
    let run = Callback::new(move |()| {
        let Some(it) = token.get_untracked() else {
            return;
        };
        busy.set(true);
        spawn_local(async move {
            match api::delete_service_token(it.id).await {
                Ok(()) => {
                    let _ = open.try_set(false);
                    toasts.succeed(format!("Token {} deleted", quoted(&it.name)));
                    loader.reload();
                }
                Err(error) => {
                    let _ = failure.try_set(Some(error));
                }
            }
            let _ = busy.try_set(false);
        });
    });
    let name = move || token.get().map(|it| it.name).unwrap_or_default();
    view! {
        <Confirm
            open
            title=Signal::derive(move || format!("Delete token {}?", quoted(&name())))
            message="Within a second, gateways that use this token can no longer check requests, and will reject all of them. This can't be undone."
            action="Delete token"
            busy
            failure
            run
        />
    }
}

/// The configuration of one gateway at a time.
#[component]
fn Configuration(#[prop(into)] token: Signal<String>) -> impl IntoView {
    let selected = RwSignal::new(Gateway::Caddy);
    // A file of the console. Without it, only the command for curl is shown.
    let files = load(api::gateway_files);
    let text = Signal::derive(move || {
        let files = files.ready().unwrap_or_default();
        selected
            .get()
            .configuration(&files, &api::origin(), &token.get())
    });
    view! {
        <fieldset class="choice">
            <legend class="visually-hidden">"Gateway"</legend>
            {Gateway::ALL
                .into_iter()
                .map(|gateway| {
                    view! {
                        <button
                            type="button"
                            class="button small"
                            aria-pressed=move || (selected.get() == gateway).to_string()
                            on:click=move |_| selected.set(gateway)
                        >
                            {gateway.name()}
                        </button>
                    }
                })
                .collect_view()}
        </fieldset>
        <CodeBlock text what="configuration"/>
    }
}

#[component]
fn CreateForm(
    open: RwSignal<bool>,
    form: FormState,
    new: NewSecret,
    loader: Loader<Page<ServiceToken>>,
) -> impl IntoView {
    form.reset();
    let name = RwSignal::new(String::new());
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        if !form.begin() {
            return;
        }
        let body = CreateServiceToken {
            name: name.get_untracked().into(),
        };
        spawn_local(async move {
            let result = api::create_service_token(body).await;
            if let Some(token) = form.finish(result) {
                let _ = open.try_set(false);
                new.show(token.service_token.name, token.token);
                loader.reload();
            }
        });
    };
    view! {
        <form novalidate on:submit=submit>
            <Alert error=form.failure()/>
            <Field form name="name" id="token_name" label="Name" value=name required=true hint="Which gateway uses it?"/>
            <div class="actions end">
                <button type="button" class="button" aria-disabled=busy_attr(form.busy) on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button primary" aria-disabled=busy_attr(form.busy) data-busy=busy_attr(form.busy)>"Create token"</button>
            </div>
        </form>
    }
}

#[component]
fn NewTokenDialog(new: NewSecret) -> impl IntoView {
    view! {
        <SecretDialog
            new
            title=Signal::derive(move || format!("Save your token for {}", quoted(&new.name.get())))
            noun="token"
            recovery="If you lose it, create a new one."
        >
            <h3>"Gateway configuration"</h3>
            <Configuration token=new.secret/>
        </SecretDialog>
    }
}
